"""What attaches to self-supervised learning: losses of similarities."""
