"""Hosts to attach techniques to: ordinary modules of common tasks."""
