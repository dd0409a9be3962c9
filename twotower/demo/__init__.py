"""The demo checkpoint: its corpus, tokenizer, training in two stages, and evaluation.

Owns everything needed to make `twotower/demo/checkpoint/` again from nothing. Knows nothing about serving.
"""
