"""Progressive gradient flow for N:M sparsity."""
