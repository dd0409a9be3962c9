"""`python -m cluster`: the commands."""
