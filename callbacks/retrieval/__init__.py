"""Callbacks for encoders of texts that are searched."""
