"""The two towers in plain PyTorch: single device, no policy, no IO but reading checkpoints, no asyncio."""
