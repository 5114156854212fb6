"""Pairs of low and high resolution."""
