"""SparseD."""
