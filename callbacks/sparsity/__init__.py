"""Sparse weights: masks, densities, schedules and counters, and the techniques built from them."""
