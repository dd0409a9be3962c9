"""Runs: what a router holds of each request, and how it goes on where a cell dies."""
