"""Kept for code written against 0.1: this is :mod:`lit_methods.runs.checkpoints` now."""

from lit_methods.runs.checkpoints import load_into, read_state_dict

__all__ = ["load_into", "read_state_dict"]
