"""The measures, by what they are about. Importing this package registers them."""

from benchmarks.subjects import adapters, batches, compiled, exchange, imports, memory, steps, wrapping  # noqa: F401
