"""SparseJEPA: I-JEPA with latents that explain groups of the embedding's numbers."""
