"""A loss term that joins the loss of any LightningModule with automatic optimisation."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_methods.callbacks.features import Calls, FeatureCallback
from lit_methods.callbacks.second_step import second_step
from lit_methods.callbacks.wrapping import attach, detach, refuse_iterators
from lit_methods.checks import naming
from lit_methods.distributed import gather_rows


class SecondPass(NamedTuple):
    """What :meth:`LossTerm.run_again` gives.

    Attributes:
        output: What was returned.
        features: Name -> last output of each target that was called.
        feature_calls: Name -> all its outputs of this pass, in call order.
    """

    output: Any
    features: dict[str, Any]
    feature_calls: Calls


class LossTerm(FeatureCallback):
    """Adds ``factor * term`` to what ``training_step`` returns: loss = the module's own + :meth:`factor` * :meth:`term`.

    Subclass it and write :meth:`term`. Each entry of the term's logs is logged as ``<name>/<metric>``, the unweighted term as
    ``<name>/loss``.

    Runs: around ``training_step``, from ``setup`` of fit to its end. The term is part of the one loss, so AMP scaling, gradient
    accumulation (which divides the sum) and DDP treat it like the module's own loss. A step that returns None stays skipped. Any number of
    terms work together, and with Lightning's weight averaging, SWA, pruning, checkpoint and accumulation callbacks in either order.
    Saves: nothing.
    Refuses: modules with manual optimisation (several optimisers need it); steps that take ``dataloader_iter``, return no loss, or compute
    the targets without a graph (frozen, under ``no_grad``, inside reentrant checkpointing) so that the term would train nothing. A
    LightningModule that is compiled as a whole crashes inside Lightning as soon as it logs: compile its networks instead. While Lightning
    tries learning rates or batch sizes, which it does without callbacks, the term is left out, and a warning says so.

    Args:
        targets: ``fnmatch`` patterns on submodule names whose outputs the term sees; empty: none.
        weight: Factor of the term, any finite number. Override :meth:`factor` for a schedule.

    Attributes:
        name: Prefix of the metrics; the class's name in snake_case unless a subclass sets it. A second term of the
            same name logs as ``<name>_2``.
        replaces: The term is the whole loss, and what the module returned is thrown away; set it where ``term`` holds that loss, too.
    """

    name: str = ""
    replaces: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    def __init__(self, targets: Sequence[str] = (), weight: float = 1.0) -> None:
        super().__init__(targets)
        self.weight = weight
        self._prefix = self.name
        self._module: pl.LightningModule | None = None
        self._batch: Any = None
        self._batch_idx = 0
        self._left_out = False

    def term(self, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The term, before its factor.

        Args:
            inputs: What the step knows:

                - ``features``: name -> output of each target; of a target that is called several times in a step, the
                  last output
                - ``feature_calls``: name -> all its outputs of this step, in call order
                - ``feature_arguments``: name -> what each of these calls got: a tuple and a dictionary of arguments
                - ``batch``: first argument of ``training_step``
                - ``batch_idx``: position of the batch in its epoch, an int
                - ``output``: what ``training_step`` returned, the terms of callbacks before this one included
                - ``module``: the LightningModule
                - ``step``: optimiser steps done so far, an int
                - ``epoch``: the current epoch, an int

        Returns:
            Scalar tensor, or (scalar tensor, metric -> scalar tensor to log).
        """
        raise NotImplementedError(f"{type(self).__name__} must define term(self, inputs)")

    def factor(self, step: int) -> float:
        """Factor of the term after ``step`` optimiser steps: ``weight``. An override must be a pure function of the step."""
        return self.weight

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks, with gradient: :func:`lit_methods.distributed.gather_rows`."""
        return gather_rows(x)

    def run_again(self, batch: Any = None, run: Callable[[Any], Any] | None = None) -> SecondPass:
        """A second pass of the step, with gradient, for :meth:`term` to call: other dropout, another view, another batch.

        No term is added to it and nothing of it is logged or counted by the module's metrics. The features of the targets are caught apart:
        neither this term's ``inputs`` nor those of other terms change. Batch norm sees the pass like any other.

        Args:
            batch: What the pass sees; None: the batch of this step.
            run: What is run on it, such as a submodule, or the module itself for its ``forward``; None: the module's ``training_step``.

        Raises:
            ValueError: ``training_step`` takes ``dataloader_iter``, which can't be read twice.
        """
        assert self._module is not None
        module, batch_idx, seen = self._module, self._batch_idx, self._batch if batch is None else batch
        with self._capture.apart() as calls:
            output = second_step(module, seen, batch_idx) if run is None else run(seen)
        return SecondPass(output, {name: outputs[-1] for name, outputs in calls.items() if outputs}, calls)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            ValueError: The module optimises manually or fetches its batches itself, or a target matches nothing.
        """
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(self).__name__} adds to the loss that training_step returns, but {type(pl_module).__name__} calls backward "
                "itself (automatic_optimization = False): add the term's function to its loss there, and remove this callback"
            )
        if stage == "fit":
            refuse_iterators(pl_module, type(self).__name__)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            rank_zero_warn(
                f"{type(pl_module).__name__} is compiled as a whole: Lightning crashes when such a module logs. Compile its inner "
                "networks instead"
            )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        alike = [callback for callback in callbacks if isinstance(callback, LossTerm) and callback.name == self.name]
        place = next(i for i, callback in enumerate(alike) if callback is self)
        self._prefix = self.name if place == 0 else f"{self.name}_{place + 1}"
        self._module, self._left_out = pl_module, False
        attach(pl_module, self._add)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to keep features."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch_idx = batch_idx

    def _add(self, output: Any, batch: Any) -> Any:
        module, features = self._module, self._capture
        assert module is not None
        if not any(callback is self for callback in module.trainer.callbacks):  # type: ignore[attr-defined]
            if not self._left_out:
                rank_zero_warn(
                    f"Lightning tries steps without callbacks here, to find a learning rate or a batch size: {type(self).__name__} adds "
                    "nothing to their loss, and takes no memory in them"
                )
            self._left_out = True
            return output
        if output is None:
            features.clear()
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"training_step of {type(module).__name__} returned {type(output).__name__} without a loss: "
                f"{type(self).__name__} needs a tensor, a dict with 'loss', or None"
            )
        silent = [name for name, calls in features.calls.items() if not calls]
        if silent:
            raise ValueError(
                f"{type(self).__name__}: training_step didn't call {', '.join(silent)}: name submodules in targets that take part in it "
                "(their __call__, not a method of theirs)"
            )
        step = module.trainer.global_step
        inputs = {
            "features": features.last,
            "feature_calls": {name: list(calls) for name, calls in features.calls.items()},
            "feature_arguments": {name: list(calls) for name, calls in features.arguments.items()},
            "batch": batch,
            "batch_idx": self._batch_idx,
            "output": output,
            "module": module,
            "step": step,
            "epoch": module.trainer.current_epoch,
        }
        self._batch = batch
        with naming(type(self).__name__):
            result = self.term(inputs)
        self._batch = None
        term, logs = result if isinstance(result, tuple) else (result, {})
        without = [name for name, calls in features.calls.items() if _has_graph(calls) is False]
        if without and not term.requires_grad and bool(term != 0):
            raise ValueError(
                f"{type(self).__name__}: the output of {', '.join(without)} has no graph, so the term would be logged and train nothing. "
                "It is frozen, or called under torch.no_grad or inside checkpointing with use_reentrant=True: name trained submodules in "
                "targets, or checkpoint with use_reentrant=False"
            )
        self._log(module, {f"{self._prefix}/{metric}": value.detach() for metric, value in {"loss": term, **logs}.items()})
        features.clear()  # the graph lives in the loss now; an optimiser that repeats the step starts afresh
        total = self.factor(step) * term if self.replaces else loss + self.factor(step) * term
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    @staticmethod
    def _log(module: pl.LightningModule, values: dict[str, Tensor]) -> None:
        """``log_dict``; between two logged steps only what callbacks see is renewed, at a thirtieth of the time."""
        # Private, because nothing public renews a value: `log` declares the metric anew at each call, 0.3 ms a metric, and leaving steps
        # out would show callbacks the term of an older step.
        trainer: Any = module.trainer
        kept: dict[str, Any] = trainer._results or {}
        metrics: list[Any] = [kept.get(f"training_step.{name}") for name in values]
        if trainer._logger_connector.should_update_logs or any(metric is None or metric.has_reset for metric in metrics):
            module.log_dict(values)
            return
        for metric, value in zip(metrics, values.values(), strict=True):
            metric.forward(value, 1)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module as it was."""
        super().leave(trainer, pl_module)
        if self._module is not None:
            detach(self._module, self._add)
        self._module = self._batch = None


def _has_graph(output: Any) -> bool | None:
    """Whether gradients flow into what a submodule put out; None: no floating-point tensor is found in it."""
    if isinstance(output, Tensor):
        return output.requires_grad if output.is_floating_point() or output.is_complex() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    answers = [_has_graph(part) for part in output] if isinstance(output, list | tuple) else []
    return True if True in answers else False if False in answers else None


__all__ = ["LossTerm", "SecondPass"]
