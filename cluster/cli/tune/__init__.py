"""`python -m cluster tune`: which γ a user's own prompts allow, asked of the running service."""
