"""The scripts behind the figures in `docs/benchmarks/`."""
