"""Data for metric learning: training and test classes are disjoint."""
