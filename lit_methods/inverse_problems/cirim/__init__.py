"""CIRIM."""
