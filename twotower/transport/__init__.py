"""Connections between our own processes: one framing, one handshake, typed messages, a sign of life (docs/adr/0011)."""
