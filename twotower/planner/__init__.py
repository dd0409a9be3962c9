"""What a checkpoint's passes cost on a device, what fits there, and how fast each mode can become. It is computed from
the architecture and the device's published figures; neither has to be at hand.
"""
