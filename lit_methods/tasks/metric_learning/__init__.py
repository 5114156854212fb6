"""Metric learning: embeddings for retrieval, their base losses and their evaluation."""
