"""The measures, by what they are about. Importing this package registers them."""

from benchmarks.subjects import (  # noqa: F401
    adapters,
    algebra,
    batches,
    compiled,
    exchange,
    imports,
    layouts,
    memory,
    methods,
    quantised,
    steps,
    wrapping,
)
