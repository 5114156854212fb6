"""Losses of masks in videos, for any module."""
