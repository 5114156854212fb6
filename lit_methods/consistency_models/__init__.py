"""Consistency models: one kit of parts (levels, curricula, metrics, samplers) and the techniques that are built of them."""
