"""The parts of `benchmarks/gpu.py`: what is measured where, and the report."""
