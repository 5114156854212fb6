"""Composed image retrieval with multi-grained uncertainty: ``core.py`` has the maths, ``networks.py`` the parts, ``module.py`` the training."""
