"""Sparse-IFT."""
