"""What to unmask, what to sample, when to stop: tensors in, tensors out."""
