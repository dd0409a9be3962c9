"""What the service tells of itself: metrics, log lines, traces. Knows runs and cells; nothing there knows it."""
