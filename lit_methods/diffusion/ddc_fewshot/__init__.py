"""DDC: a diffusion model of images is adapted to ten pictures of another domain, and keeps the content of what it translates."""
