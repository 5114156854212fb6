"""Recommenders that learn from implicit feedback: LightGCN, NeuMF, MultVAE."""
