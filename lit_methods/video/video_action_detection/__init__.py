"""Semi-supervised video action detection: see ``core.py`` for the maths and ``module.py`` for the training."""
