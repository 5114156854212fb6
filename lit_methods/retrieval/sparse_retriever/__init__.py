"""Inference-free learned sparse retriever: see ``core.py`` for the maths and ``module.py`` for the training."""
