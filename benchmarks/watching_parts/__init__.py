"""Parts of `benchmarks.watching`."""
