"""Restoration of images and videos: what its techniques share."""
