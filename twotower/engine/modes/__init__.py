"""The modes that a denoiser leads, a strategy each. `ar` has no denoiser: `twotower.engine.context.decoding`."""
