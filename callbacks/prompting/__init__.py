"""Callbacks for models of images and texts."""
