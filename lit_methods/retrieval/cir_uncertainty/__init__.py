"""Composed image retrieval with uncertainty: ``core.py`` has the maths, ``networks.py`` the parts, ``module.py`` the training."""
