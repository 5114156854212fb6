"""FDS: feature distribution smoothing for skewed labels."""
