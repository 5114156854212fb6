"""DASS."""
