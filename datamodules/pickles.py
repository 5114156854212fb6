"""Pickled arrays, read without running anything that a file names."""

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

_HOMES = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2
_REFUSED = (
    pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip


class _ArrayClass:
    """Stands for ``numpy.ndarray`` as an argument, which must not be called: it would make arrays of any size without values."""


def _empty_array(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    """``numpy.core.multiarray._reconstruct`` with the only arguments that it is pickled with; the values follow as a state."""
    if kind is not _ArrayClass or shape != (0,):
        raise pickle.UnpicklingError("it makes an array in a way that NumPy doesn't")
    return np.empty(0)


def _dtype(code: Any, *_: Any) -> np.dtype[Any]:
    """``numpy.dtype`` of a name such as ``u1``."""
    kind = np.dtype(code, align=False, copy=True) if isinstance(code, str) else np.dtype(object)  # a copy, since a state follows
    if kind.kind not in "biufSUO" or kind.names or kind.subdtype:
        raise pickle.UnpicklingError(f"it holds arrays of {str(code)[:20]!r}, expected numbers")
    return kind


def _scalar(kind: Any, content: Any) -> Any:
    """``numpy.core.multiarray.scalar``."""
    return np.frombuffer(content if isinstance(content, bytes) else str(content).encode("latin1"), kind)[0]


def _from_buffer(buffer: Any, dtype: Any, shape: Sequence[int], order: Any) -> NDArray[Any]:
    """What NumPy pickles an array as with protocol 5."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes as {str(encoding)[:20]!r}")
    return codecs.latin_1_encode(text)[0]


_KNOWN: dict[tuple[str, str], Any] = {
    **{(home, "_reconstruct"): _empty_array for home in _HOMES},
    **{(home, "scalar"): _scalar for home in _HOMES},
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class ArraysOnly(pickle._Unpickler):
    """Reads arrays and numbers of NumPy, lists, dictionaries, strings and bytes, of any protocol; refuses everything else.

    It is Python's own unpickler written in Python, whose steps can be replaced: keys of dictionaries are strings, bytes or integers alone,
    since tuples in tuples take for ever to compare; only arrays and dtypes get a state.

    Attributes:
        owner: What the file is, for the message.
    """

    owner = "file of arrays"
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The few constructors that such a file needs.

        Raises:
            UnpicklingError: It names another one.
        """
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no {self.owner} needs") from None


def _with_keys(step: Callable[[Any], None], keys: Callable[[Any], Sequence[Any]]) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        if not all(type(key) in (str, bytes, int) for key in keys(unpickler)):
            raise pickle.UnpicklingError(f"it has keys that are no names, which no {unpickler.owner} has")
        step(unpickler)

    return checked


def _refused(unpickler: Any) -> None:
    raise pickle.UnpicklingError(f"it has objects of kinds that no {unpickler.owner} has")


def _build(unpickler: Any) -> None:
    state, target = unpickler.stack[-1], unpickler.stack[-2]
    if isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 5:
        fine = isinstance(state[2], np.dtype) and (not state[2].hasobject or isinstance(state[4], list))
    else:  # version, order of bytes, and what structured dtypes have
        fine = isinstance(target, np.dtype) and isinstance(state, tuple) and len(state) >= 5 and all(one is None for one in state[2:5])
    if not fine:
        raise pickle.UnpicklingError(f"it gives a {type(target).__name__} a state that no {unpickler.owner} has")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


def _bytearray(unpickler: Any) -> None:
    """Python's own makes room for what is claimed before it reads."""
    size = int.from_bytes(unpickler.read(8), "little")
    content = unpickler.read(size)
    if len(content) < size:
        raise pickle.UnpicklingError("it is truncated")
    unpickler.append(bytearray(content))


ArraysOnly.dispatch[pickle.BYTEARRAY8[0]] = _bytearray
for _code in _REFUSED:
    ArraysOnly.dispatch[_code[0]] = _refused
ArraysOnly.dispatch[pickle.BUILD[0]] = _build
ArraysOnly.dispatch[pickle.SETITEM[0]] = _with_keys(ArraysOnly.dispatch[pickle.SETITEM[0]], lambda unpickler: unpickler.stack[-2:-1])
ArraysOnly.dispatch[pickle.SETITEMS[0]] = _with_keys(ArraysOnly.dispatch[pickle.SETITEMS[0]], lambda unpickler: unpickler.stack[::2])
ArraysOnly.dispatch[pickle.DICT[0]] = _with_keys(ArraysOnly.dispatch[pickle.DICT[0]], lambda unpickler: unpickler.stack[::2])


def ordered(*entries: Any) -> OrderedDict[Any, Any]:
    """``collections.OrderedDict``, empty: what torch pickles with each tensor."""
    if entries:
        raise pickle.UnpicklingError("it has an ordered dictionary with entries")
    return OrderedDict()


__all__ = ["ArraysOnly", "ordered"]
