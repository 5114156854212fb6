"""InterLCM: low-quality images as intermediate states of a latent consistency model (arXiv:2502.02215)."""
