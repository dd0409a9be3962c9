"""Harnesses that measure; nothing here is imported by the library or the service."""
