"""What `python -m benchmarks.simulate` is made of."""
