"""`bench`: a load on a running service, and what its clients saw. Asks through twotower_client; no torch, no engine."""
