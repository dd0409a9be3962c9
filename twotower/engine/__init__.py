"""State and time: one engine per tower, the scheduler that picks a tick's work, and the pair that joins them."""
