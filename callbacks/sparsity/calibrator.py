"""The layer-wise calibrator: statistics of the inputs of linear layers, block by block; each block sees what pruned ones put out."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods import distributed
from lit_methods.callbacks.batch import tensors_in
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics
from lit_methods.callbacks.targets import plain_module, plain_modules

Forward = Callable[[Any], Any]
Prune = Callable[[dict[str, InputStatistics]], None]


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is y = W x + b: ``nn.Linear``, or GPT-2's ``Conv1D``, which keeps W transposed."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def rows_of_outputs(module: nn.Module) -> Tensor:
    """A linear layer's weight as (outputs, inputs), a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_transposed(module) else weight


def find_blocks(root: nn.Module, blocks: str) -> list[nn.Module]:
    """The children of a list of blocks.

    Args:
        root: Any module, also a compiled one.
        blocks: Name of a ``ModuleList`` or ``Sequential`` in it.

    Raises:
        ValueError: There is no such list; the message has those that there are.
    """
    everything = plain_modules(root)
    found = everything.get(blocks)
    if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
        lists = [name for name, part in everything.items() if name and isinstance(part, nn.ModuleList | nn.Sequential) and len(part)]
        kind = "there is no such submodule" if found is None else f"that is a {type(found).__name__}"
        known = f"one of {', '.join(lists[:8])}" if lists else "null, as there are none"
        raise ValueError(f"blocks is {blocks!r}, but {kind} of {type(root).__name__}: give the name of a ModuleList or Sequential: {known}")
    return list(found)


class _AllSeen(Exception):
    """A batch has been through all blocks: what comes behind them isn't needed."""


@dataclass
class _Call:
    """One call of a block: the activations that go in, and what else it was given."""

    hidden: Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any], str | None]]  # per block: arguments, and the keyword of the activations


def _without_cache(value: Any) -> Any:
    """Arguments without what a first pass would have filled: keys and values of earlier tokens."""
    return None if type(value).__name__.endswith("Cache") else value


def _first_tensor(value: Any) -> Tensor | None:
    return next(tensors_in(value), None)


class LayerwiseCalibrator:
    """Runs calibration batches through a model and hands out the statistics of its layers' inputs.

    With blocks, the model is run once per batch to see what goes into the first block; then, block after block, its layers' statistics are
    taken, ``prune`` is called, and the block is run again for what goes into the next one. Only the activations between two blocks are
    held, and the statistics of one block. Without blocks, all layers are looked at in one pass, as they are before any is pruned, and the
    statistics of all of them are held. Under DDP the sums of all ranks are added up, so that each rank sees the same statistics.

    Args:
        layers: Name -> linear layer, as they are called.
        blocks: Modules that run one after the other, each on what the one before put out; (): none.
        hessian: Take the Hessian of the inputs as well.

    Attributes:
        held: Largest number of bytes held at once: activations between blocks and statistics.

    Raises:
        ValueError: A layer lies in none of the blocks.
    """

    def __init__(self, layers: Mapping[str, nn.Module], blocks: Sequence[nn.Module] = (), hessian: bool = False) -> None:
        self.layers, self.blocks, self.hessian, self.held = dict(layers), list(blocks), hessian, 0
        inside = {id(plain_module(module)) for block in blocks for module in block.modules()}
        outside = [name for name, layer in layers.items() if blocks and id(plain_module(layer)) not in inside]
        if outside:
            raise ValueError(f"{', '.join(outside[:8])} lie in none of the blocks: leave them out by targets or skip, or give no blocks")

    @torch.no_grad()
    def run(self, forward: Forward, batches: Iterable[Any], prune: Prune) -> None:
        """Take statistics and let layers be pruned.

        Args:
            forward: Runs the model on a batch, in evaluation mode.
            batches: The calibration batches of this process.
            prune: Is called with the statistics of a block's layers (without blocks: of all layers), by name; changes the weights in place.

        Raises:
            ValueError: No batch, a layer that saw no input, or blocks that don't feed each other.
        """
        if not self.blocks:
            found = self._start(self.layers)
            count = self._watched(self.layers, found, lambda: _exhaust(forward, batches))
            self._check_some(count)
            self._hand_out(found, prune, [])
            return
        calls = self._capture(forward, batches)
        self._check_some(len(calls))
        for index, block in enumerate(self.blocks):
            own = {id(plain_module(module)) for module in block.modules()}
            layers = {name: layer for name, layer in self.layers.items() if id(plain_module(layer)) in own}
            if layers:
                found = self._start(layers)
                self._watched(layers, found, lambda i=index: _exhaust(functools.partial(self._call, i), calls))  # type: ignore[misc]
                self._hand_out(found, prune, calls)
            if index + 1 < len(self.blocks):
                for call in calls:
                    call.hidden = self._call(index, call)

    def _check_some(self, count: int) -> None:
        """Raise on all ranks together if none of them has a batch."""
        device = rows_of_outputs(plain_module(next(iter(self.layers.values())))).device
        if not int(distributed.sum_over_ranks(torch.tensor(count, device=device))):
            raise ValueError("there are no calibration data: the loader gives no batch, or samples is 0")

    def _start(self, layers: Mapping[str, nn.Module]) -> dict[str, InputStatistics]:
        found = {}
        for name, layer in layers.items():
            weight = rows_of_outputs(plain_module(layer))
            dtype = torch.promote_types(weight.dtype, torch.float32)
            found[name] = InputStatistics.of(weight.shape[1], self.hessian, weight.device, dtype)
        return found

    @staticmethod
    def _watched(layers: Mapping[str, nn.Module], found: dict[str, InputStatistics], act: Callable[[], Any]) -> Any:
        """``act()``, in which each call of a layer is taken up."""

        def watch(statistics: InputStatistics) -> Any:
            return lambda _, args, kwargs: statistics.add(args[0] if args else next(iter(kwargs.values())))

        handles = [layer.register_forward_pre_hook(watch(found[name]), with_kwargs=True) for name, layer in layers.items()]
        try:
            return act()
        finally:
            for handle in handles:
                handle.remove()

    def _hand_out(self, found: dict[str, InputStatistics], prune: Prune, calls: Sequence[_Call]) -> None:
        statistics = {}
        for name, own in found.items():
            statistics[name] = InputStatistics.from_sums([distributed.sum_over_ranks(part) for part in own.summed()])
        counts = torch.stack([own.samples for own in statistics.values()]).tolist()  # one wait for the device
        unseen = [name for name, count in zip(statistics, counts, strict=True) if not count]
        if unseen:
            way = "run the whole network (forward), give more calibration data, or skip it"
            raise ValueError(f"{', '.join(unseen[:8])} got no input from the calibration data: {way}")
        activations = sum(call.hidden.numel() * call.hidden.element_size() for call in calls)
        self.held = max(self.held, activations + sum(own.bytes() for own in statistics.values()))
        prune(statistics)

    def _capture(self, forward: Forward, batches: Iterable[Any]) -> list[_Call]:
        """What goes into the first block with each batch, and the other arguments of each block."""
        calls: list[_Call] = []
        seen: list[tuple[tuple[Any, ...], dict[str, Any], str | None]] = []
        before: list[Tensor | None] = [None]
        first: list[Tensor] = []

        def enter(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if index != len(seen):
                    raise ValueError(self._odd(index, "is not called once, in its place"))
                key = None if args and isinstance(args[0], Tensor) else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
                hidden = kwargs[key] if key is not None else args[0] if args else None
                if not isinstance(hidden, Tensor):
                    raise ValueError(self._odd(index, "is not called with activations"))
                if index and hidden is not before[0]:
                    raise ValueError(self._odd(index, "doesn't get what the one before puts out"))
                if not index:
                    first.append(hidden.detach())
                rest = tuple(_without_cache(value) for value in (args[1:] if key is None else args))
                others = {name: _without_cache(value) for name, value in kwargs.items() if name != key}
                seen.append((rest, others | ({"use_cache": False} if "use_cache" in others else {}), key))

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            before[0] = _first_tensor(output)
            if calls and len(seen) == len(self.blocks):  # the first batch has shown that nothing calls them again
                raise _AllSeen

        handles = [block.register_forward_pre_hook(enter(index), with_kwargs=True) for index, block in enumerate(self.blocks)]
        handles += [block.register_forward_hook(leave) for block in self.blocks]
        try:
            for batch in batches:
                seen.clear()
                first.clear()
                with contextlib.suppress(_AllSeen):
                    forward(batch)
                if len(seen) != len(self.blocks):
                    raise ValueError(self._odd(len(seen), "is not called"))
                calls.append(_Call(first[0], list(seen)))
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _odd(self, index: int, what: str) -> str:
        kind = type(plain_module(self.blocks[index])).__name__
        return f"block {index} ({kind}) {what}: blocks must run one after the other; give blocks: null, or the name of another list"

    def _call(self, index: int, call: _Call) -> Tensor:
        args, kwargs, key = call.others[index]
        block = self.blocks[index]
        output = block(call.hidden, *args, **kwargs) if key is None else block(*args, **kwargs, **{key: call.hidden})
        return _first_tensor(output)  # type: ignore[return-value]  # it was one before


def _exhaust(forward: Forward, batches: Iterable[Any]) -> int:
    """Run all batches and keep nothing of what comes out; their number."""
    count = 0
    for batch in batches:
        forward(batch)
        count += 1
    return count
