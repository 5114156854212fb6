"""SuperFlow++: image-to-LiDAR pretraining with spatiotemporal consistency (arXiv:2503.19912)."""

import lazy_loader

# lazy: the data side imports the maths from here and needs neither Lightning nor a network
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["core"], submod_attrs={"module": ["SuperFlow"]})
