"""Callbacks for the restoration of images and videos."""
