"""Prompt learning for models of images and texts."""
