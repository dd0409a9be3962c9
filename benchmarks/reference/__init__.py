"""The parts of `benchmarks/reference_loop.py`: the naive loop, the ways to serve requests, the report."""
