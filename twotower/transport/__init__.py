"""Connections between our own processes: one framing, one handshake, typed messages, a beat (docs/adr/0011)."""
