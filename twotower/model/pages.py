"""How many positions a KV page holds. Pure Python, so that ledger and scheduler need no torch to count."""

PAGE_TOKENS = 16


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // PAGE_TOKENS)
