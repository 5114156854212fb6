"""Callbacks for point clouds."""
