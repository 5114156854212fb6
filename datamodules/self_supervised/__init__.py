"""Data of self-supervised learning: lists of similarities."""
