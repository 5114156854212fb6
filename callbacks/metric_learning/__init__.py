"""Metric learning: losses on embeddings that attach to any module."""
