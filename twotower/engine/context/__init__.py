"""What the context tower's engine does, a file each: commits, prompts, causal decoding, scoring; over one owner of
sequences."""
