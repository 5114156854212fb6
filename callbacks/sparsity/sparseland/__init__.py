"""Sparseland."""
