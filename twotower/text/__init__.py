"""Between tokens and text: tokenizers, text that grows with its tokens, stop strings in it."""
