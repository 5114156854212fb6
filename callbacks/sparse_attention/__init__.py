"""Callbacks that put sparse attention into models."""
