"""Activations and gradients on a few training batches, for the choice of heads and channels."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_methods import distributed
from lit_methods.callbacks.fine_tuning.s2ft.core import Kind
from lit_methods.callbacks.fine_tuning.s2ft.layers import oriented
from lit_methods.callbacks.targets import plain_modules
from lit_methods.callbacks.twin import independent_copy, step_by_hand, training_batches


def _losses(trainer: pl.Trainer, twin: pl.LightningModule, batches: int) -> Iterator[Any]:
    """What the training step of a copy returns on the first training batches.

    Raises:
        ValueError: There is none, or training data can't be read twice.
    """
    try:
        found = list(itertools.islice(training_batches(trainer), batches))
    except ValueError as error:
        raise ValueError("this strategy reads training batches, which need a DataLoader or a list: use strategy='R' or 'W'") from error
    if not found:
        raise ValueError("this strategy needs a training batch, but the training data are empty: use strategy='R' or 'W'")
    twin.to(trainer.strategy.root_device)
    for number, batch in enumerate(found):
        yield twin.training_step(batch, number) if twin.automatic_optimization else step_by_hand(trainer, twin, batch)


def activation_squares(
    trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str], kind: Kind, batches: int
) -> dict[str, Tensor]:
    """Squared activations of each channel, summed over samples, batches and ranks.

    Args:
        trainer: Of the run that begins.
        pl_module: Isn't touched: a copy runs, in evaluation mode.
        names: Linear layers.
        kind: ``column``: of their outputs; ``row``: of their inputs.
        batches: Training batches.

    Returns:
        Name -> (channels,) float32 on the CPU.
    """
    with isolate_rng():
        twin = independent_copy(trainer, pl_module).eval()
        modules, sums = plain_modules(twin), dict[str, Tensor]()
        for name in names:

            def watch(_: Any, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                seen = output if kind == "column" else inputs[0]
                squared = seen.detach().float().reshape(-1, seen.shape[-1]).square().sum(0).cpu()
                sums[name] = sums.get(name, torch.zeros_like(squared)) + squared

            modules[name].register_forward_hook(watch)
        with torch.no_grad():
            for _ in _losses(trainer, twin, batches):
                pass
    if unused := [name for name in names if name not in sums]:
        raise ValueError(f"{unused[0]} isn't called in a training step: leave it out by targets or couplings")
    return {name: distributed.sum_over_ranks(squared) for name, squared in sums.items()}


def weight_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str], batches: int) -> Mapping[str, Tensor]:
    """Gradients of the loss by weights, summed over batches and ranks.

    Args:
        trainer: Of the run that begins.
        pl_module: Isn't touched: a copy runs.
        names: Linear layers.
        batches: Training batches.

    Returns:
        Name -> (out, in), float32 or wider.
    """
    with isolate_rng():
        twin = independent_copy(trainer, pl_module)
        modules: Any = plain_modules(twin)
        twin.requires_grad_(False)
        for name in names:
            modules[name].weight.requires_grad_(True)
        for output in _losses(trainer, twin, batches):
            loss = output["loss"] if isinstance(output, Mapping) else output
            loss.backward()
    found = {name: modules[name].weight.grad for name in names}
    if unused := [name for name, grad in found.items() if grad is None]:
        raise ValueError(f"the loss doesn't depend on {unused[0]}: leave it out by targets or couplings")
    return {name: distributed.sum_over_ranks(oriented(modules[name], grad).contiguous()) for name, grad in found.items()}


__all__ = ["activation_squares", "weight_gradients"]
