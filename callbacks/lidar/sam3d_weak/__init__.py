"""Masks for weakly supervised point clouds (arXiv:2508.19909)."""
