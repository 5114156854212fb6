"""AbsTopK."""
