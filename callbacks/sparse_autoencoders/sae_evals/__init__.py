"""Supervised dictionaries as a yardstick for sparse autoencoders."""
