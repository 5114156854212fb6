"""Images and vectors that are to be restored."""
