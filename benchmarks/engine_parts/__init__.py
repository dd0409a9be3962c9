"""Parts of `python -m benchmarks.engine`: tower processes that are watched, bare passes, ceilings, shares of time."""
