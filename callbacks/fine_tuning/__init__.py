"""Sparse fine-tuning: a chosen few of a pretrained module's weights are trained, and what was learned is kept as a small delta."""
