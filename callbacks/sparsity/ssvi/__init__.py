"""SSVI: variational inference in a sparse subspace that is searched while the network learns."""
