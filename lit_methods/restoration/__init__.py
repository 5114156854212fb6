"""Restoration of images and videos by generative models: colours, perceptual distances, techniques."""
