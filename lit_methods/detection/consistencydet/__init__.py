"""ConsistencyDet: object detection as denoising of boxes in few steps (arXiv:2404.07773)."""
