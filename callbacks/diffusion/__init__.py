"""What attaches to generators of images."""
