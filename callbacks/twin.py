"""Twins of somebody's module: copies that may be run, counted and thrown away without a trace in the original."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader


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


def validation_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Batches of this rank's validation loaders, on the device, as many as a validation would see."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    limit = trainer.limit_val_batches
    if source.instance is None or not source.is_defined() or not limit:
        return
    loaders: Any = source.dataloader()
    loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        number = limit if isinstance(limit, int) else None if limit >= 1 else int(limit * len(loader))
        for batch in islice(loader, number):
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
