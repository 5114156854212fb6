"""Denoising diffusion with any network: a host for techniques that fine-tune one."""
