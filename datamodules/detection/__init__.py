"""Images with boxes of objects."""
