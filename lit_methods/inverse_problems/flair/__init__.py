"""FLAIR."""
