"""Callbacks for labels that are wrong, missing or unevenly spread."""
