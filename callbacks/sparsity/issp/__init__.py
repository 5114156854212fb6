"""ISS-P."""
