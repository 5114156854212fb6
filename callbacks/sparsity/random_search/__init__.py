"""Random search for sparse networks."""
