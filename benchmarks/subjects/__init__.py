"""The measures, by what they are about. Importing this package registers them."""

from benchmarks.subjects import adapters, algebra, batches, compiled, exchange, imports, memory, steps, wrapping  # noqa: F401
