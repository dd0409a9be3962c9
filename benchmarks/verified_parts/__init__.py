"""Parts of the benchmark of verified drafts."""
