"""Activations of models: harvested from real ones and kept on disk, or made up."""
