"""Twins of somebody's module: copies that may be run, counted and thrown away without a trace in the original."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lit_methods.callbacks.targets import is_sharded
from lit_methods.frozen import Frozen


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


class WithoutGraph(TorchFunctionMode):
    """Inside, ``deepcopy`` takes the value of a tensor that hangs in a graph, where torch refuses to copy it.

    Such tensors are what ``weight_norm`` and ``torch.nn.utils.prune`` leave on a module (made anew at each call), or kept outputs.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def _is_of_callback(hook: Any) -> bool:
    """Whether a hook belongs to a callback of this package: those on forward passes watch, or act on the original alone."""
    inner = hook.func if isinstance(hook, functools.partial) else hook
    return f"{getattr(inner, '__module__', '')}.".startswith("lit_methods.callbacks.")


def _rebound(function: Any, memo: Mapping[int, Any]) -> Any:
    """A function that means the copies where the original means what was copied; ``deepcopy`` leaves functions alone."""

    def counterpart(value: Any) -> Any:
        if isinstance(value, types.MethodType) and isinstance(memo.get(id(value.__self__)), nn.Module):
            return types.MethodType(value.__func__, memo[id(value.__self__)])
        return memo.get(id(value), value) if isinstance(value, nn.Module | Tensor) else value

    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:  # a compiled function belongs to what it was compiled from; the copy's runs as it was written
        rebound = counterpart(_rebound(compiled, memo))
        return function if rebound is compiled else rebound
    if isinstance(function, functools.partial):
        arguments = {name: counterpart(value) for name, value in function.keywords.items()}
        return functools.partial(counterpart(_rebound(function.func, memo)), *map(counterpart, function.args), **arguments)
    if not isinstance(function, types.FunctionType):
        return function
    try:
        inside = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a variable without a value
        return function
    defaults, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
    if all(counterpart(value) is value for value in (*inside, *defaults, *keywords.values())):
        return function
    cells = tuple(types.CellType(counterpart(value)) for value in inside)
    defaults = tuple(map(counterpart, defaults))
    rebound = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults or None, cells or None)
    rebound.__kwdefaults__ = {name: counterpart(value) for name, value in keywords.items()} or None
    vars(rebound).update(vars(function))
    return rebound


def copy_of(module: nn.Module, shared: Iterable[Any] = ()) -> nn.Module:
    """A deep copy with the hooks that compute (adapters, say), which act on the copy, and without those of our callbacks.

    Functions that the instance holds as attributes act on the copy, too. What hooks and functions use outside of the module isn't copied:
    they go on using the original of it.

    Args:
        module: May hold tensors with a graph, as ``weight_norm`` and ``torch.nn.utils.prune`` leave them.
        shared: What the copy has in common with the module.
    """
    watching = [hook for part in module.modules() for hook in part._forward_hooks.values() if _is_of_callback(hook)]
    memo: dict[int, Any] = {id(one): one for one in (*shared, *watching)}
    with WithoutGraph():
        twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for key, hook in list(part._forward_hooks.items()):
            if _is_of_callback(hook):
                del part._forward_hooks[key]
                part._forward_hooks_with_kwargs.pop(key, None)
                part._forward_hooks_always_called.pop(key, None)
        held: list[dict[Any, Any]] = [part._forward_hooks, part._forward_pre_hooks, vars(part)]
        for functions in held:
            functions.update({key: _rebound(value, memo) for key, value in functions.items() if callable(value)})
    return twin


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """All parameters, those of frozen parts included, which ``parameters()`` leaves out."""
    hidden = [part.module.parameters() for part in module.modules() if isinstance(part, Frozen)]
    return [parameter for parameters in (module.parameters(), *hidden) for parameter in parameters]


class _Writes(TorchDispatchMode):
    """Copies each watched tensor before the first operation that writes into its memory."""

    def __init__(self, watched: Iterable[Tensor]) -> None:
        super().__init__()
        self.watched = {tensor.untyped_storage().data_ptr(): tensor for tensor in watched}
        self.kept: list[tuple[Tensor, Tensor]] = []  # tensor, its values before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                value = given.get(argument.name)
                if argument.is_write:
                    for tensor in value if isinstance(value, list | tuple) else [value]:
                        if isinstance(tensor, Tensor) and (own := self.watched.pop(tensor.untyped_storage().data_ptr(), None)) is not None:
                            self.kept.append((own, own.clone()))
        return func(*args, **kwargs)


@contextmanager
def unwritten(module: nn.Module, *, watch: bool = True) -> Iterator[None]:
    """Inside, a step may write into the module's parameters, as one that moves an averaged teacher does; afterwards they are as before.

    Args:
        module: A :func:`shadow`, say, whose parameters are the original's.
        watch: Look at every operation, and keep what it is about to overwrite; False, where operations are timed: keep all at once, on
            the CPU.
    """
    held = [(parameter, parameter.data) for parameter in _weights(module) if not is_lazy(parameter)]
    kept = [] if watch else [(data, data.cpu().clone()) for _, data in held]
    writes = _Writes([data for _, data in held] if watch else [])
    try:
        with writes if watch else nullcontext():
            yield
    finally:
        with torch.no_grad():
            for parameter, data in held:  # assigning to `data` is no operation
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
            for data, value in [*kept, *writes.kept]:
                data.copy_(value)


def shadow(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy in eval mode that shares parameters with the module and nothing else: buffers, metrics and counters are its own.

    It logs nothing, and has neither the forward hooks of callbacks nor what they have wrapped around its steps. A step of it that may write
    into parameters runs in :func:`unwritten`.
    """
    twin = copy_of(pl_module, [*_weights(pl_module), trainer, *trainer.callbacks, *trainer.loggers])  # type: ignore[attr-defined]
    assert isinstance(twin, pl.LightningModule)
    for step in ("training_step", "validation_step", "test_step", "predict_step", "log", "log_dict"):
        vars(twin).pop(step, None)
    silent: dict[str, Any] = {"log": _ignore, "log_dict": _ignore}
    silent |= {"logger": property(lambda _: DummyLogger()), "loggers": property(lambda _: [])}
    silent["__qualname__"] = f"shadow.<locals>.{type(twin).__name__}"  # else the command finds it beside the class of that name
    twin.__class__ = type(type(twin).__name__, (type(twin),), silent)
    twin.trainer = trainer
    return twin.eval()


def observed(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str) -> pl.LightningModule:
    """What a measurement runs instead of the module, so that counters, queues, generators and metrics in it stay where they are.

    A :func:`shadow`; the module itself where its weights are sharded or it can't be copied, which a warning says.
    """
    if is_sharded(trainer):
        return pl_module
    try:
        with torch.inference_mode(False):
            return shadow(trainer, pl_module)
    except Exception as error:
        rank_zero_warn(
            f"{who}: {type(pl_module).__name__} can't be copied ({type(error).__name__}: {error}), so it is itself run once more: what its "
            "forward pass counts or keeps goes on"
        )
        return pl_module


class _AloneNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of any shape on one process."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def independent_copy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy that shares nothing with the module, in training mode, that logs nothing and waits for no other process."""
    keep = (trainer, *trainer.callbacks, *trainer.loggers)  # type: ignore[attr-defined]
    twin = copy_of(shadow(trainer, pl_module), keep)
    assert isinstance(twin, pl.LightningModule)
    for module in twin.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = _AloneNorm  # type: ignore[assignment]
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in twin.parameters()):
        twin = twin.float()
    return twin.train()


class _Still:
    """In an optimiser's place: it can be asked like that, and steps nothing."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return None if closure is None else closure()

    zero_grad = _ignore

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield


def step_by_hand(trainer: pl.Trainer, twin: pl.LightningModule, batch: Any) -> Any:
    """What ``training_step`` of an :func:`independent_copy` returns that optimises manually; nothing is stepped, switched or clipped."""
    twin.trainer = trainer
    optimizers = twin.optimizers()
    still = [_Still(one) for one in optimizers] if isinstance(optimizers, list) else _Still(optimizers)
    vars(twin).update(dict.fromkeys(("toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _ignore))
    vars(twin)["optimizers"] = lambda use_pl_optimizer=True: still
    vars(twin)["manual_backward"] = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)
    vars(twin)["lr_schedulers"] = lambda: None
    return twin.training_step(*(batch, 0)[: len(inspect.signature(twin.training_step).parameters)])


def training_batches(
    trainer: pl.Trainer, who: str = "SNIP and GraSP take a batch", instead: str = "choose a method by shape, such as 'erk'"
) -> Iterator[Any]:
    """Batches of the training loader of this rank, on the device, as a first epoch would bring them; the loader itself is not advanced.

    Args:
        trainer: While fit runs.
        who: Who takes what, for the message.
        instead: What to do about another loader, for the message.

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
        raise ValueError(f"{who} from a training DataLoader, got {type(loader).__name__}: {instead}")
    for batch in loader:
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def has_validation(trainer: pl.Trainer) -> bool:
    """Whether fit has validation data, known from ``setup`` on."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.instance is not None and source.is_defined() and bool(trainer.limit_val_batches)


def validation_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Batches of this rank's validation loaders, on the device, as many as a validation would see."""
    limit = trainer.limit_val_batches
    if not has_validation(trainer):
        return
    loaders: Any = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
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
