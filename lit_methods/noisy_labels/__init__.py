"""Learning from labels that are wrong, missing or unevenly spread."""
