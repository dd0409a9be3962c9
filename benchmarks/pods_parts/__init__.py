"""Hosts without machines, with our RayService on them: the parts of benchmarks/pods.py, and of tests/pods."""
