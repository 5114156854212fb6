"""SaRA."""
