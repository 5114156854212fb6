"""Published training techniques on consistency, sparsity and regularisation, for PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

try:
    __version__ = version("lit-methods")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

# The public names and the modules that hold them stand in __init__.pyi; a module is imported when its name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
