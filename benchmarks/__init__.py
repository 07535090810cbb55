"""Programs that measure what the farm promises. `python -m benchmarks.NAME --help` explains each."""
