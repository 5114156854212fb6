"""Data for regression with skewed labels."""
