"""Supervised dictionary learning with auxiliary covariates (arXiv:2206.06774): atoms that reconstruct the data and predict a label."""
