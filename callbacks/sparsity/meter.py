"""The FLOP meter: what one forward pass of anybody's module costs, and what its training has spent so far. Theory, 2 FLOPs per MAC."""

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_methods import distributed
from lit_methods.callbacks.batch import tensors_in
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.cost import Cost, Timing, measure, theoretical_cost, training_cost
from lit_methods.callbacks.sparsity.flops import Macs, count_macs
from lit_methods.callbacks.targets import plain_parameters
from lit_methods.callbacks.twin import shadow, unwritten


def batch_size(batch: Any) -> int:
    """Size of the first dimension of the first tensor in a batch; 0 where there is none."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim and len(tensor)), 0)


def _run(twin: pl.LightningModule, name: str, batch: Any, precision: Any) -> Any:
    """One method of a module on a batch; steps get 0 as their further arguments."""
    method = getattr(twin, name)
    others = len(inspect.signature(method).parameters) - 1 if name.endswith("_step") else 0
    with precision:
        return method(batch, *(0, 0)[: max(0, others)])


def count_on_batch(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, forward: str | None = None
) -> tuple[Macs | None, str, str]:
    """Count a forward pass of a batch through a shadow of the module; generators of random numbers stay as they were.

    Args:
        trainer: The module's trainer.
        pl_module: Any module.
        batch: What the training step gets, on the device.
        forward: Name of the method that is run; None: the first step that works.

    Returns:
        MACs of the batch by parameter (None: nothing could be run), the method's name, and what went wrong on the way.
    """
    weights = {name: weight for name, weight in plain_parameters(pl_module).items() if weight.ndim >= 2}
    problems: list[str] = []
    with isolate_rng(pl_module.device.type == "cuda"):
        try:
            twin = shadow(trainer, pl_module)
            steps = ["validation_step", "test_step"] + (["training_step"] if twin.automatic_optimization else [])
            known = [*(step for step in steps if is_overridden(step, twin, pl.LightningModule)), "predict_step"]
        except Exception as error:  # a module may hold anything
            return None, "", _one_line(f"no copy of the module can be made: {type(error).__name__}: {error}")
        for name in known if forward is None else [forward]:
            # autocast makes copies of the weights, which the counter doesn't know; it is off here and in count_macs
            precision = nullcontext() if "mixed" in str(trainer.precision) else trainer.precision_plugin.val_step_context()
            inputs = apply_to_collection(batch, Tensor, torch.clone)
            try:
                with unwritten(twin):
                    macs = count_macs(twin, lambda name=name, p=precision, x=inputs: _run(twin, name, x, p), weights)  # type: ignore[misc]
            except Exception as error:  # the user's code, on a batch that it may not be made for
                problems.append(_one_line(f"{name}: {type(error).__name__}: {error}"))
                continue
            if sum(macs.per_weight.values()):
                return macs, name, "; ".join(problems)
            problems.append(f"{name}: no weight is used")
    return None, "", "; ".join(problems)


def _one_line(problem: str) -> str:
    return " ".join(problem.split())[:300]


class FlopMeter:
    """Counts a forward pass once, and adds up what training spends at the density of the moment.

    Attributes:
        macs: Count of one batch: ``per_weight``, ``other``, ``samples``, and the ``method`` that was run; None before it is counted.
        uncountable: Why nothing could be counted.
        cost: Cost of one forward pass per sample, at the last density.
        per_sample: Training FLOPs per sample, at the last density.
        flops: Training FLOPs so far, on all processes.
        samples: Training samples so far, on all processes.
    """

    def __init__(self) -> None:
        self.macs: dict[str, Any] | None = None
        self.cost: Cost | None = None
        self.uncountable, self.per_sample, self.flops, self.samples = "", 0.0, 0.0, 0

    def count(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, forward: str | None, who: str) -> None:
        """Count a forward pass, on all ranks, as a step may gather.

        Raises:
            RuntimeError: The method that was asked for can't be run.
        """
        macs, method, problems = count_on_batch(trainer, pl_module, batch, forward)
        ready = distributed.gather_rows(torch.tensor([macs is not None], device=pl_module.device), with_grad=False)
        if macs is not None and bool(ready.all()):
            samples = batch_size(batch) or 1
            self.macs = {"per_weight": macs.per_weight, "other": macs.other, "samples": samples, "method": method}
            return
        self.uncountable = problems or "another process failed"
        if forward is not None:
            raise RuntimeError(f"{who} can't count FLOPs with forward={forward!r}: {self.uncountable}")
        rank_zero_warn(
            f"{who} reports no FLOPs, as it can't run {type(pl_module).__name__} on a training batch ({self.uncountable}); "
            "give forward the name of a method (batch) that runs the network once"
        )

    def price(self, density: Mapping[str, float], cards: Mapping[str, SparsityCard]) -> None:
        """Set the cost by the layers' densities and by the regimes of the methods that mask them."""
        if self.macs is not None:
            self.cost = theoretical_cost(Macs(self.macs["per_weight"], self.macs["other"]), density, self.macs["samples"])
            self.per_sample = training_cost(self.cost, cards)

    def spend(self, batch: Any, processes: int) -> None:
        """Add a batch of every process."""
        samples = (batch_size(batch) or 1) * processes
        self.samples += samples
        self.flops += samples * self.per_sample

    def time(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Timing:
        """Measured latency of the counted method, with masked dense weights."""
        assert self.macs is not None
        name = str(self.macs["method"])
        with isolate_rng(pl_module.device.type == "cuda"):
            twin, context = shadow(trainer, pl_module), trainer.precision_plugin.val_step_context
            with unwritten(twin, watch=False) if name == "training_step" else nullcontext():
                return measure(lambda: _run(twin, name, batch, context()), pl_module.device, "dense-masked", batch_size(batch) or 1)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the count, and the sums so far."""
        return {"macs": copy.deepcopy(self.macs), "uncountable": self.uncountable, "flops": self.flops, "samples": self.samples}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.macs, self.uncountable = copy.deepcopy(state["macs"]), str(state["uncountable"])
        self.flops, self.samples = float(state["flops"]), int(state["samples"])
