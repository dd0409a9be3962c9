"""What passes of a checkpoint cost on a device, what fits there, and how fast each mode can become: worked out from the
architecture and the device's published figures, without either at hand.
"""
