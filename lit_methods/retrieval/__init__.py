"""Search: documents and queries as vectors whose inner product says how relevant one is to the other."""
