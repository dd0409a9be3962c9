"""The tasks of the context tower's engine, a file each: commits, prompts, causal decoding, scoring. One object owns the
sequences.
"""
