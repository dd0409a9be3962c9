"""Parts of `python -m benchmarks.transport`: candidates, two processes, faults, threads, report."""
