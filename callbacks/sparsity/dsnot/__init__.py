"""Dynamic Sparse No Training: masks of a pruned layer, improved by swaps that need no gradient."""
