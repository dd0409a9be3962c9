"""How commands and tokens cross to the context tower, and cache deltas back to the denoiser."""
