"""Runs: a router's state of each request, and how the request continues when a cell dies."""
