"""Diffusion models: what samplers, denoisers and techniques share."""
