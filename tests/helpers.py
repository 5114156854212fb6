"""What several test files need: a small trainer, two processes, a killed and resumed run, comparison of state dicts."""

import atexit
import contextlib
import functools
import io
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.logger_connector.result import warning_cache
from torch import Tensor
from torch.utils.data import DataLoader

import forks
from forks import HANGS as HANGS


@functools.cache
def _scratch() -> str:
    """One folder per test process, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="lit_methods_tests_")
    atexit.register(folder.cleanup)
    return folder.name


def tiny_trainer(**kwargs: Any) -> pl.Trainer:
    """A trainer for the CPU that writes nothing (its callbacks: into a temporary folder); any argument of ``pl.Trainer`` overrides."""
    defaults: dict[str, Any] = {
        "default_root_dir": _scratch(),
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(defaults | kwargs))


def assert_state_dicts_equal(actual: dict[str, Any], expected: dict[str, Any], *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Same keys in any order, same dtypes, every tensor within ``atol + rtol * |expected|`` (0: bit-equal, signed zeros aside)."""
    assert set(actual) == set(expected), f"keys differ: {sorted(set(actual) ^ set(expected))}"
    wrong = []
    for name, want in expected.items():
        try:
            torch.testing.assert_close(actual[name], want, atol=atol, rtol=rtol, equal_nan=True)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def cloned_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A state dict that later training doesn't change."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# ---- a killed run ----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """What ends the run in mid-flight."""


class KillAt(pl.Callback):
    """Saves a checkpoint and ends the run with :class:`Killed` when ``trainer.global_step`` reaches ``step``."""

    def __init__(self, step: int, path: str | Path) -> None:
        self.step, self.path = step, Path(path)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Killed


class SaveAt(pl.Callback):
    """Saves a checkpoint behind batch ``batch`` of the run, counted from 1, and lets the run go on."""

    def __init__(self, batch: int, path: str | Path) -> None:
        self.batch, self.path, self.seen = batch, Path(path), 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            trainer.save_checkpoint(self.path)


Build = Callable[[], tuple[pl.LightningModule, Any, list[pl.Callback]]]


class LoaderCheck(pl.Callback):
    """Refuses a train loader with which a resumed run would see other batches than the uninterrupted one, whatever is tested."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaders = trainer.train_dataloader
        for loader in loaders.values() if isinstance(loaders, Mapping) else loaders if isinstance(loaders, list | tuple) else [loaders]:
            keeps_its_place = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
            if isinstance(loader, DataLoader) and not keeps_its_place and trainer.num_training_batches > 1:
                raise TypeError(
                    f"kill_and_resume got a {type(loader).__name__} of several batches without state_dict and load_state_dict: a resumed "
                    "run would begin its epoch anew\n  build it with lit_methods.datamodules.loaders.make_loader(..., seed=0)"
                )


def kill_and_resume(
    build: Build, steps: int, kill_at: int, tmp_path: Path, *, seed: int = 0, **trainer_kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train ``steps`` optimiser steps in one go, and again with a kill right after step ``kill_at`` and a resume in fresh objects.

    The resumed process starts with other random number generators than the first, as a new process would.

    Args:
        build: Returns new objects on every call: the module, the data (a datamodule or a train loader), the callbacks.
        steps: Optimiser steps of the whole run.
        kill_at: 1 <= kill_at < steps; the checkpoint is saved as soon as ``trainer.global_step`` reaches it.
        tmp_path: An empty folder.
        seed: Seed of the first two runs.
        trainer_kwargs: For the trainer of all runs.

    Returns:
        State dicts of the module after the uninterrupted and after the resumed run.

    Raises:
        TypeError: The train loader can't go on with the next batch, for it has several and no ``state_dict``.
    """
    path = tmp_path / "killed.ckpt"

    def fit(seed: int, extra: list[pl.Callback], ckpt_path: Path | None = None) -> dict[str, Tensor]:
        pl.seed_everything(seed, verbose=False)
        module, data, callbacks = build()
        trainer = tiny_trainer(max_steps=steps, default_root_dir=tmp_path, callbacks=[LoaderCheck(), *callbacks, *extra], **trainer_kwargs)
        data_kwargs = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data}
        trainer.fit(module, ckpt_path=ckpt_path, weights_only=True, **data_kwargs)
        assert trainer.global_step == steps, f"ended after {trainer.global_step} of {steps} steps"
        return cloned_state(module)

    whole = fit(seed, [])
    with contextlib.suppress(Killed):
        fit(seed, [KillAt(kill_at, path)])
        raise AssertionError(f"the run ended before step {kill_at}")
    return whole, fit(seed + 4711, [], path)


# ---- a fresh process -------------------------------------------------------------------------------------------------


def run_python(
    words: Sequence[object],
    cwd: str | Path = ".",
    env: Mapping[str, str] | None = None,
    *,
    forget: Sequence[str] = (),
    timeout: float = HANGS,
) -> "subprocess.CompletedProcess[str]":
    """Run ``python <words>`` in a process of its own, which has imported torch, Lightning and lit_methods already.

    Where the start itself is the promise (import time, what is imported, the console script), take ``subprocess.run``; see
    ``tests/forks.py`` for the differences.

    Args:
        words: ``-m module ...``, ``-c code ...`` or ``script.py ...``.
        cwd: Its current folder.
        env: Its whole environment; None: this process's.
        forget: Top-level packages that it imports anew, such as ``("lit_methods",)`` for a copy of ours in ``cwd``.
        timeout: Seconds before it is killed and ``subprocess.TimeoutExpired`` is raised.
    """
    forks.hold()
    given = [str(word) for word in words]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        child = forks.fork(given, cwd, env, (nothing.fileno(), out.fileno(), err.fileno()), forget)
        try:
            status = child.wait(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(given, timeout) from None
        finally:
            child.kill()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    return subprocess.CompletedProcess(given, status, *texts)


def run_lit(
    words: Sequence[object], cwd: str | Path = ".", env: Mapping[str, str] | None = None, *, timeout: float = HANGS
) -> "subprocess.CompletedProcess[str]":
    """Run ``lit <words>`` as :func:`run_python` does; the result has ``returncode``, ``stdout`` and ``stderr``."""
    return run_python(["-m", "lit_methods", *words], cwd, env, timeout=timeout)


# ---- two processes ---------------------------------------------------------------------------------------------------


def _serve(rank: int, world_size: int, port: int, store: str, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),  # tells Lightning that the processes exist already
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=HANGS))
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        try:
            sys.path[:], where = pickle.loads(task)
            fn, args = pickle.loads(where)
            buffer = io.BytesIO()
            torch.save(fn(*args), buffer)
            pipe.send_bytes(b"+" + buffer.getvalue())
        except BaseException:
            pipe.send_bytes(b"-" + traceback.format_exc().encode())


class _Pair:
    """Two processes that wait for work: starting them costs more than most tests."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        store = tempfile.mktemp(prefix="gloo-")
        forks.hold()
        self.pipes: list[Connection] = []
        self.processes: list[forks.Fork] = []
        for rank in range(2):
            ours, theirs = socket.socketpair()
            code = f"import helpers; helpers._serve({rank}, 2, {port}, {store!r}, helpers.given_pipe())"
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
            self.processes.append(forks.fork(["-c", code], environment=environment, descriptors=(0, 1, 2, theirs.fileno())))
            theirs.close()
            self.pipes.append(Connection(ours.detach()))

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        task = pickle.dumps((sys.path, pickle.dumps((fn, args))))
        for pipe in self.pipes:
            pipe.send_bytes(task)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(errors) < len(self.pipes):
            silent = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results | errors]
            ready = wait(silent, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (self.pipes.index(pipe) for pipe in ready):  # type: ignore[arg-type]
                try:
                    answer = self.pipes[rank].recv_bytes()
                except (EOFError, ConnectionError):
                    answer = b"-died without a word"
                if answer[:1] == b"+":
                    results[rank] = torch.load(io.BytesIO(answer[1:]), weights_only=False)
                else:
                    errors[rank] = answer[1:].decode()
                    deadline = min(deadline, time.monotonic() + 1.0)  # the partner may be stuck, or may know more
        if errors:
            raise RuntimeError("\n".join(f"rank {rank} of {fn.__name__} failed:\n{text}" for rank, text in sorted(errors.items())))
        if len(results) < len(self.pipes):
            raise TimeoutError(f"rank(s) {sorted({0, 1} - set(results))} of {fn.__name__} gave no answer within {timeout:.0f} s")
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self) -> None:
        """End both at once: one may wait for the other."""
        for process in self.processes:
            process.kill()
        self.close()

    def close(self) -> None:
        """Let both end, and wait until they have."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except TimeoutError:
                process.kill()
                process.wait()


def given_pipe() -> Connection:
    """The connection that this process was forked with."""
    return Connection(int(os.environ[forks.EXTRA]))


_pair: _Pair | None = None


def _close_pair() -> None:
    global _pair
    if _pair is not None:
        _pair.close()
        _pair = None


atexit.register(_close_pair)


def run_two_processes(fn: Callable[..., Any], *args: Any, timeout: float = HANGS) -> list[Any]:
    """Call ``fn(*args)`` in two processes that share a gloo process group, and return both results, rank 0 first.

    The processes are kept for the next call, and thrown away after an error. Inside ``fn``, ``tiny_trainer(devices=2, strategy="ddp")``
    uses them.

    Args:
        fn: A function at the top level of a test module.
        args: Anything picklable.
        timeout: Seconds before both are ended and ``TimeoutError`` is raised.

    Raises:
        RuntimeError: One of them failed; the message holds its traceback.
    """
    global _pair
    if _pair is None:
        _pair = _Pair()
    try:
        return _pair.run(fn, args, timeout)
    except BaseException:
        _pair.kill()
        _pair = None
        raise


@contextlib.contextmanager
def advice_on_figures() -> Iterator[list[str]]:
    """Collects what Lightning says of ``sync_dist`` to figures of an epoch that it can't know to be those of all processes."""
    warning_cache.clear()  # it says so once per process
    advice: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield advice
    advice += [str(warning.message) for warning in caught if "sync_dist" in str(warning.message)]


# ---- modules that are not ours -----------------------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """A network with dropout and batch norm that returns a dict. Samples: (image, label)."""

    def __init__(self, network: torch.nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.network = network or small_network()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss = torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return {"loss": loss, "seen": torch.tensor(len(batch[0]))}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def small_network() -> torch.nn.Sequential:
    """(B, 3, 8, 8) -> (B, 4); submodules 0 to 7."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def resnet_classifier() -> Classifier:
    """Torchvision's ResNet-18 on small images."""
    from torchvision.models import resnet18

    torch.manual_seed(7)
    return Classifier(resnet18(num_classes=4))


def compiled_classifier() -> Classifier:
    """Its inner network is compiled, with the backend that only traces."""
    torch._dynamo.reset()  # torch reuses what it traced of another network of this shape, and that one's hooks, or their absence
    torch.manual_seed(7)
    return Classifier(torch.compile(small_network(), backend="eager"))  # type: ignore[arg-type]


class TwoOptimisers(Classifier):
    """Steps a network and its head in turn, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimiser in self.optimizers():  # type: ignore[union-attr]
            optimiser.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1]))
            optimiser.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [torch.optim.SGD(self.network[:5].parameters(), lr=0.1), torch.optim.SGD(self.network[5:].parameters(), lr=0.1)]  # type: ignore[index]


class Images(torch.utils.data.Dataset):
    """``size`` pairs of a (3, 8, 8) image and a label in 0..3; takes an index or (epoch, index)."""

    def __init__(self, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(11)
        self.images = torch.randn(size, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, 4, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: Any) -> tuple[Tensor, Tensor]:
        index = draw[1] if isinstance(draw, tuple) else draw
        return self.images[index], self.labels[index]


def fingerprint(module: torch.nn.Module) -> dict[str, Any]:
    """What can be left on a module: attributes and hooks of every submodule, parametrisations included."""
    found: dict[str, Any] = {}
    for name, submodule in module.named_modules():
        attributes = {key: value for key, value in vars(submodule).items() if key not in ("_trainer", "trainer")}
        hooks = {key: list(value) for key, value in attributes.items() if "hooks" in key and isinstance(value, dict)}
        found[name] = (type(submodule), sorted(attributes), hooks, sorted(submodule._parameters), sorted(submodule._buffers))
    return found


def left_behind(
    build: Callable[[], pl.LightningModule],
    callback: pl.Callback | Callable[[], pl.Callback],
    loader: Any,
    raises: type[BaseException] | None = None,
    **trainer_kwargs: Any,
) -> dict[str, Any]:
    """What a callback leaves on a module behind a run: what differs from a run without it, so not what Lightning itself leaves.

    Args:
        build: Returns a new module on every call.
        callback: The callback, or what makes it.
        loader: What both runs train on.
        raises: The error that ends the run with the callback; None: it comes to its end.
        trainer_kwargs: For the trainers of both runs, which train for one epoch unless these say otherwise.

    Returns:
        Name of a submodule -> (with the callback, without it), both as in :func:`fingerprint`, None for a submodule that isn't there.
        Empty: nothing is left behind.
    """
    prints = []
    for callbacks in ([callback if isinstance(callback, pl.Callback) else callback()], []):
        module = build()
        trainer = tiny_trainer(**({"max_epochs": 1, "limit_val_batches": 0} | trainer_kwargs), callbacks=callbacks)
        with contextlib.nullcontext() if raises is None or not callbacks else contextlib.suppress(raises):
            trainer.fit(module, loader)
            assert raises is None or not callbacks, f"the run did not end with {raises.__name__}"
        prints.append(fingerprint(module))
    with_it, without = prints
    return {name: (with_it.get(name), without.get(name)) for name in {**with_it, **without} if with_it.get(name) != without.get(name)}
