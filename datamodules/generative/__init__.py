"""Data for generative models: points in the plane, and images in [-1, 1]."""
