"""The Sparse Frontier."""
