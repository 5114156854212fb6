"""Images with a class at every pixel."""
