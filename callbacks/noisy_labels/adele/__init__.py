"""ADELE."""
