"""sLCT: consistency training that withstands outliers, made for latents (arXiv:2502.01441)."""
