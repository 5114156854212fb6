"""One base model that serves several deltas in one batch. Nothing here knows Lightning."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_methods.callbacks.fine_tuning.delta import Delta, Entry, check_base
from lit_methods.callbacks.fine_tuning.s2ft import core
from lit_methods.callbacks.fine_tuning.s2ft.layers import is_linear, matrix_of
from lit_methods.callbacks.targets import plain_modules


class Serving:
    """Which delta each request of the next batches takes: call it with their numbers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.which: Tensor | None = None

    def __call__(self, which: Sequence[int] | Tensor) -> None:
        """Choose.

        Args:
            which: Number of the delta of each request, (B,); -1: the base model.

        Raises:
            ValueError: A number that no delta has.
        """
        chosen = torch.as_tensor(which, dtype=torch.int64)
        if chosen.numel() and not (int(chosen.min()) >= -1 and int(chosen.max()) < self.number):
            raise ValueError(f"which={chosen.tolist()}: give numbers of {self.number} deltas from 0, or -1 for the base model")
        self.which = chosen


def _stacked(entries: Sequence[Entry | None], kind: core.Kind) -> tuple[Tensor, Tensor]:
    """Indices (N, k) and values (N, k, in) or (N, out, k) of several deltas; shorter ones are filled up with values of 0."""
    some = next(entry for entry in entries if entry is not None)
    rows = [entry.values if kind == "column" else entry.values.T for entry in entries if entry is not None]
    empty = rows[0].new_zeros(0, rows[0].shape[1])
    indices = pad_sequence([some.index[:0] if entry is None else entry.index for entry in entries], batch_first=True)
    values = iter(rows)
    stacked = pad_sequence([empty if entry is None else next(values) for entry in entries], batch_first=True)
    return indices, stacked if kind == "column" else stacked.transpose(1, 2)


@contextlib.contextmanager
def serving(model: nn.Module, deltas: Sequence[Delta], check: bool = True) -> Iterator[Serving]:
    """Inside, each request of a batch is answered with a delta of its own, or with the base model.

    Args:
        model: The base model; its weights aren't touched.
        deltas: Of linear layers, by rows or columns.
        check: Compare the hash of the base model, which reads all of its weights.

    Yields:
        Call it with the number of each request's delta before the model is called. Requests are the first dimension of all layers' inputs.

    Raises:
        ValueError: Deltas of another base model, of single positions, or of layers that aren't linear.
    """
    if check:
        check_base(model, *deltas)
    modules, serve = plain_modules(model), Serving(len(deltas))
    names = list(dict.fromkeys(name for delta in deltas for name in delta.entries))
    handles: list[Any] = []

    def add_to(layer: nn.Module, kind: core.Kind, index: Tensor, values: Tensor) -> Any:
        outputs = len(matrix_of(layer))

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            if serve.which is None or len(serve.which) != len(x):
                given = "nothing was chosen" if serve.which is None else f"{len(serve.which)} deltas were chosen"
                raise ValueError(f"{given} for a batch of {len(x)} requests: call serve([...]) with the number of each one's delta first")
            where, what, which = (part.to(x.device) for part in (index, values, serve.which))
            return output + core.batched_delta(x, where, what, which, kind, outputs).to(output.dtype)

        return layer.register_forward_hook(hook)

    try:
        for name in names:
            owner, _, attribute = name.rpartition(".")
            layer, entries = modules[owner], [delta.entries.get(name) for delta in deltas]
            dims = {entry.dim for entry in entries if entry is not None}
            if attribute != "weight" or not is_linear(layer) or None in dims:
                raise ValueError(f"{name} can't be served side by side, only rows and columns of linear layers: fuse the delta")
            flipped = any(entry.transposed for entry in entries if entry is not None)
            for dim in sorted(dim for dim in dims if dim is not None):
                kind: core.Kind = "column" if (dim == 0) != flipped else "row"
                same = [entry if entry is not None and entry.dim == dim else None for entry in entries]
                handles.append(add_to(layer, kind, *_stacked(same, kind)))
        yield serve
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Serving", "serving"]
