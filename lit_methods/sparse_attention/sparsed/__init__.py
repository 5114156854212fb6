"""SparseD: each head of a denoiser keeps its own blocks of keys, chosen once and used for the rest of a generation (arXiv:2509.24014)."""
