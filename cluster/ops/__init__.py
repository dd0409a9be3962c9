"""A service is put on Ray, found again, and taken away."""
