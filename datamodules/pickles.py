"""Pickled arrays, read without running anything that a file names."""

import codecs
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# taken from examples, as their homes differ between NumPy 1 and 2
_REBUILT = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float32(0).__reduce__()[0]}


def _from_buffer(buffer: Any, dtype: Any, shape: Sequence[int], order: Any) -> NDArray[Any]:
    """What NumPy pickles an array as with protocol 5."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


class ArraysOnly(pickle.Unpickler):
    """Reads arrays and numbers of NumPy, lists, dictionaries, strings and bytes, of any protocol; refuses everything else.

    Attributes:
        owner: What the file is, for the message.
    """

    owner = "file of arrays"

    def find_class(self, module: str, name: str) -> Any:
        """The few constructors that such a file needs.

        Raises:
            UnpicklingError: It names another one.
        """
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in _REBUILT:
            return _REBUILT[name]
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _from_buffer
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no {self.owner} needs")


__all__ = ["ArraysOnly"]
