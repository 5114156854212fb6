"""Implicit feedback for recommenders."""
