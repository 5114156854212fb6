"""MaskSparsity."""
