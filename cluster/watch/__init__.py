"""The service's reports: metrics, log lines, traces. Knows runs and cells, which do not know this package."""
