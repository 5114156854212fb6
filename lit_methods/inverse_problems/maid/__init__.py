"""MAID."""
