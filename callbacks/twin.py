"""Twins of somebody's module: copies that may be run, counted and thrown away without a trace in the original."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_methods.callbacks.sparsity.flops import Macs, count_macs
from lit_methods.callbacks.targets import plain_name


def _plain_parameter_name(name: str) -> str:
    return re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", plain_name(name))


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by the names that they have without ``torch.compile`` and parametrisations; tied ones once."""
    return {_plain_parameter_name(name): parameter for name, parameter in module.named_parameters()}


def _samples(batch: Any) -> int | None:
    """Size of the first dimension of the first tensor in a batch."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for found in map(_samples, values) if found), None)


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def shadow(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy in eval mode that shares parameters with the module and nothing else: buffers, metrics and counters are its own.

    It logs nothing, and has neither forward hooks nor what callbacks have wrapped around its steps.
    """
    shared = [*pl_module.parameters(), trainer, *trainer.callbacks, *trainer.loggers]  # type: ignore[attr-defined]
    twin = copy.deepcopy(pl_module, {id(one): one for one in shared})
    for step in ("training_step", "validation_step", "test_step", "predict_step", "log", "log_dict"):
        vars(twin).pop(step, None)
    for module in twin.modules():
        module._forward_hooks.clear()  # they watch; pre-hooks may make weights
    silent: dict[str, Any] = {"log": _ignore, "log_dict": _ignore}
    silent |= {"logger": property(lambda _: DummyLogger()), "loggers": property(lambda _: [])}
    silent["__qualname__"] = f"shadow.<locals>.{type(twin).__name__}"  # else the command finds it beside the class of that name
    twin.__class__ = type(type(twin).__name__, (type(twin),), silent)
    twin.trainer = trainer
    return twin.eval()


def _runs(twin: pl.LightningModule, forward: str | None) -> list[str]:
    """Methods that can run the network on a batch, best first."""
    if forward is not None:
        return [forward]
    steps = ["validation_step", "test_step"] + (["training_step"] if twin.automatic_optimization else [])
    return [*(step for step in steps if is_overridden(step, twin, pl.LightningModule)), "predict_step"]


def _call(twin: pl.LightningModule, name: str, batch: Any, precision: Any) -> Any:
    method = getattr(twin, name)
    names = list(inspect.signature(method).parameters)
    others = (0, 0)[: max(0, len(names) - 1)] if name.endswith("_step") else ()
    with precision:
        return method(batch, *others)


def count_on_batch(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, forward: str | None = None
) -> tuple[Macs | None, str, list[str]]:
    """Count a forward pass of a batch through a :func:`shadow` of the module; generators of random numbers stay as they were.

    Args:
        trainer: Its trainer.
        pl_module: Any module.
        batch: As the training step gets it, on the device.
        forward: Name of the method that is run; None: the first step that works.

    Returns:
        MACs of the batch by parameter (None: nothing could be run), the method's name, and what went wrong on the way.
    """
    weights = {name: weight for name, weight in _parameters(pl_module).items() if weight.ndim >= 2}
    problems: list[str] = []
    with isolate_rng(pl_module.device.type == "cuda"):
        try:
            twin = shadow(trainer, pl_module)
            candidates = _runs(twin, forward)
        except Exception as error:  # a module may hold anything
            return None, "", [f"no copy of the module can be made: {type(error).__name__}: {error}"]
        for name in candidates:
            # autocast makes copies of the weights, which the counter doesn't know; it is off here and in count_macs
            precision = nullcontext() if "mixed" in str(trainer.precision) else trainer.precision_plugin.val_step_context()
            inputs = apply_to_collection(batch, Tensor, torch.clone)
            try:
                macs = count_macs(twin, lambda name=name, p=precision, x=inputs: _call(twin, name, x, p), weights)  # type: ignore[misc]
            except Exception as error:  # the user's code, on a batch that it may not be made for
                problems.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if sum(macs.per_weight.values()):
                return macs, name, problems
            problems.append(f"{name}: no weight is used")
    return None, "", problems


class _AloneNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of any shape on one process."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def independent_copy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy that shares nothing with the module, in training mode, that logs nothing and waits for no other process."""
    keep = (trainer, *trainer.callbacks, *trainer.loggers)  # type: ignore[attr-defined]
    twin = copy.deepcopy(shadow(trainer, pl_module), {id(one): one for one in keep})
    for module in twin.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = _AloneNorm  # type: ignore[assignment]
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in twin.parameters()):
        twin = twin.float()
    return twin.train()


def training_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Batches of the training loader of this rank, on the device, as a first epoch would bring them; the loader itself is not advanced.

    Raises:
        ValueError: The training data are neither a ``DataLoader`` nor a list of batches.
    """
    loader: Any = trainer.fit_loop._data_source.dataloader()
    if isinstance(loader, DataLoader):
        live = getattr(loader, "_iterator", None)  # of persistent workers
        shared = [one for one in (loader.dataset, loader.collate_fn, loader.worker_init_fn, live) if one is not None]
        loader = copy.deepcopy(loader, {id(one): one for one in shared})
        loader._iterator = None
        loader.num_workers, loader.timeout = 0, 0.0
    elif not isinstance(loader, list | tuple):
        raise ValueError(
            f"SNIP and GraSP take a batch from a training DataLoader, got {type(loader).__name__}: choose a method by shape, such as 'erk'"
        )
    for batch in loader:
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode and without gradients; afterwards each submodule has its own mode again."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes:
            child.training = training
