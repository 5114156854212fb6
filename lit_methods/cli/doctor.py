"""``lit doctor``: whether a run could start, without starting it. Models are built on the meta device, weights aren't read."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_methods.cli.quiet import quiet
from lit_methods.errors import CommandError
from lit_methods.hub import NotThereError

HELP = """\
usage: lit doctor <config> [overrides as lit fit takes them] [--json] [--elsewhere]

Looks whether a run could start: data, weights, libraries, GPUs, disk; counts parameters, memory of the optimiser, steps and samples per
step; says what the run will write. Nothing is trained, downloaded or written (built-in samples are made in the cache), and models take no
memory: it runs on a login node.

  <config>       such as configs/full/tcm_cub.yaml; further ones with --config
  --elsewhere    the run goes to another machine: GPUs aren't looked for here
  --json         everything as one JSON object

  lit doctor configs/full/tcm_cub.yaml --data.init_args.root ~/CUB_200_2011 --trainer.devices 2

Exit status: 0 everything is there, 1 something is missing, 2 a mistake in the arguments.
"""

OK, MISSING, UNKNOWN = "ok", "missing", "unknown"
_FILES = "config.yaml, environment.json, git.json, metrics.jsonl, report.html"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        what: data, weights, libraries, GPUs, disk, model.
        state: ok, missing, or unknown.
        said: In words: what was given, what is missing, what to do.
    """

    what: str
    state: str
    said: str


@dataclass
class Diagnosis:
    """All that :func:`diagnose` finds out; what can't be known is None.

    Attributes:
        config: The configs.
        findings: What is there and what isn't.
        parameters: Numbers of the module before callbacks change it.
        trained: Those of them that an optimiser gets.
        memory: Bytes per GPU before activations, by kind: weights, gradients, optimiser.
        steps_per_epoch: Optimiser steps of an epoch.
        total_steps: Optimiser steps of the training.
        epochs: Its epochs.
        samples_per_step: Of all processes and accumulated batches together.
        recipe_samples: The same for the shipped recipe as it stands; None for other configs.
        recipe_words: What the recipe says of its batch size.
        writes: Folder and files that the run will write.
        checkpoint: Bytes of a checkpoint, at least.
    """

    config: list[str]
    findings: list[Finding] = field(default_factory=list)
    parameters: int | None = None
    trained: int | None = None
    memory: dict[str, int] | None = None
    steps_per_epoch: int | None = None
    total_steps: int | None = None
    epochs: int | None = None
    samples_per_step: int | None = None
    recipe_samples: int | None = None
    recipe_words: str | None = None
    writes: str = ""
    checkpoint: int | None = None

    @property
    def missing(self) -> list[Finding]:
        """What isn't there."""
        return [finding for finding in self.findings if finding.state == MISSING]


def doctor(argv: list[str]) -> int:
    """``lit doctor <config> [overrides]``: say whether the run could start."""
    if not argv or "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0 if argv else 2
    as_json, elsewhere = "--json" in argv, "--elsewhere" in argv
    words = [word for word in argv if word not in ("--json", "--elsewhere")]
    if words and not words[0].startswith("-"):
        words = ["--config", *words]
    if not any(word.partition("=")[0] in ("--config", "-c", "--model") for word in words):
        raise CommandError("lit doctor needs a config: lit doctor configs/full/tcm_cub.yaml")
    loggers = ("lightning.pytorch", "lightning.fabric", "transformers")
    with quiet(*loggers), contextlib.redirect_stdout(io.StringIO()):  # the JSON goes there
        found = diagnose(words, elsewhere=elsewhere)
    text = json.dumps(dataclasses.asdict(found) | {"missing": len(found.missing)}, indent=2) if as_json else described(found)
    print(text)
    return 1 if found.missing else 0


# ---- what is looked at -----------------------------------------------------------------------------------------------------------------


def diagnose(words: list[str], elsewhere: bool = False) -> Diagnosis:
    """Look at a run.

    Args:
        words: Arguments as ``lit fit`` takes them.
        elsewhere: Don't look for GPUs.

    Raises:
        CommandError: A mistake in the arguments or configs.
    """
    from lit_methods.cli.lightning_cli import planned

    cli, files = planned(["fit", *words])
    config = cli.config["fit"]
    found = Diagnosis([str(file) for file in files])
    processes = _processes(config.trainer, found, elsewhere)
    data = _data(cli, config, processes, found)
    plan = _plan(config, data, processes, found)
    _callbacks(cli, config, found)
    _model(cli, config, plan, found)
    _files_of_weights(config, found)
    _recipe(files, config, processes, found)
    _writes(config, found)
    order = ["data", "weights", "libraries", "model", "GPUs", "disk"]
    found.findings = sorted(dict.fromkeys(found.findings), key=lambda finding: order.index(finding.what))
    return found


def _processes(trainer: Any, found: Diagnosis, elsewhere: bool) -> int:
    """Processes of the run; notes whether this machine has its GPUs."""
    import torch

    here = torch.cuda.device_count()
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and here > 0)
    devices = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdecimal():
        devices = int(devices)
    if isinstance(devices, str):  # auto, or "0,1"
        devices = [part for part in devices.split(",") if part] if devices != "auto" else -1
    own = len(devices) if isinstance(devices, list) else devices
    own = (max(1, here) if on_gpu else 1) if own == -1 else own
    nodes = trainer.num_nodes
    if on_gpu and not elsewhere:
        asked = f"{own} GPU{'s' * (own != 1)}" + (f" on each of {nodes} machines" if nodes > 1 else "")
        if here >= own:
            found.findings.append(Finding("GPUs", OK, f"{asked} asked for, {here} here: {torch.cuda.get_device_name(0)}"))
        else:
            way = "start it where they are (--elsewhere leaves this out), or set trainer.devices or trainer.accelerator"
            found.findings.append(Finding("GPUs", MISSING, f"{asked} asked for, {here or 'none'} here: {way}"))
    elif on_gpu:
        found.findings.append(Finding("GPUs", UNKNOWN, f"{own} of each machine asked for, not looked for here (--elsewhere)"))
    else:
        found.findings.append(Finding("GPUs", OK, f"none asked for (accelerator={trainer.accelerator})"))
    return int(own) * int(nodes)


def _data(cli: Any, config: Any, processes: int, found: Diagnosis) -> Any:
    """The datamodule, set up; None where it isn't there or can't be read."""
    from lightning.pytorch import LightningDataModule

    section = config.get("data")
    if section is None:
        found.findings.append(Finding("data", UNKNOWN, "no data section: the module brings its own loaders, which aren't looked at"))
        return None
    prepares = False
    train: Any = None
    try:
        data = cli.built("data", section)
        if hasattr(data, "check_root"):
            data.check_root("fit")
        prepares = type(data).prepare_data is not LightningDataModule.prepare_data
        with tempfile.TemporaryDirectory() as folder:  # for what a set-up writes into the run's folder
            data.trainer = _trainer(config, processes, folder=folder)
            data.setup("fit")
            train = getattr(data, "train_set", None)
            if hasattr(train, "__getitem__") and hasattr(train, "__len__") and len(train):
                train[0]  # a library that only reading needs, a broken file
    except Exception as error:
        finding = _from_error("data", error)
        if prepares and isinstance(error, FileNotFoundError):
            finding = Finding("data", UNKNOWN, f"the layout is right, and what the run prepares itself isn't there yet: {_short(error)}")
        found.findings.append(finding)
        if finding.what == "weights":
            found.findings.append(Finding("data", UNKNOWN, "can't be set up without them"))
        return None
    root = _root_of(section)
    number = len(train) if hasattr(train, "__len__") else None
    count = "" if number is None else f", {number:,} training samples"
    found.findings.append(Finding("data", OK, (root or "built in, no download") + count))
    return data


def _trainer(config: Any, processes: int, steps: int = 1, folder: str | None = None) -> Any:
    """A trainer that runs nothing, and says what the run's own would say of its processes and of its length."""
    from lightning.pytorch import Trainer

    class Planned(Trainer):
        estimated_stepping_batches = steps  # type: ignore[assignment]
        num_training_batches = steps  # type: ignore[assignment]
        world_size = processes  # type: ignore[assignment]

    epochs = config.trainer.max_epochs
    return Planned(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        max_epochs=epochs if epochs and epochs > 0 else None,
        default_root_dir=folder,
    )


def _root_of(section: Any) -> str | None:
    for key, value in section.items():
        if key.rpartition(".")[2] == "root" and value is not None:
            from lit_methods.datamodules.folders import data_path

            return str(data_path(value))
    return None


def _plan(config: Any, data: Any, processes: int, found: Diagnosis) -> int:
    """Optimiser steps of the training, as far as they are known, else 1,000: a stand-in for schedules."""
    trainer, batches = config.trainer, None
    only_judged = getattr(data, "train_set", True) is None and getattr(data, "test_set", None) is not None
    if data is not None and not only_judged:
        try:
            batches = _length(data.train_dataloader())
        except Exception as error:
            found.findings.append(_from_error("data", error))
    limit = trainer.get("limit_train_batches")
    if batches is not None and limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if batches is not None:
        found.steps_per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is None and steps == -1:
        epochs = 1000  # Lightning's
    ends = [] if steps in (-1, None) else [steps]
    if epochs not in (None, -1) and found.steps_per_epoch is not None:
        ends.append(epochs * found.steps_per_epoch)
    known = ends and not (epochs not in (None, -1) and found.steps_per_epoch is None)
    found.total_steps = min(ends) if known else None
    if found.total_steps is not None and found.steps_per_epoch is not None:
        found.epochs = math.ceil(found.total_steps / found.steps_per_epoch)
    elif epochs not in (None, -1):
        found.epochs = epochs
    return found.total_steps or (ends[0] if ends else 1000)


def _length(loader: Any) -> int | None:
    try:
        if type(loader).__name__ == "CombinedLoader":
            lengths = [len(part) for part in loader.flattened]
            return min(lengths) if loader._mode == "min_size" else sum(lengths) if loader._mode == "sequential" else max(lengths)
        return len(loader)
    except TypeError:
        return None


def _callbacks(cli: Any, config: Any, found: Diagnosis) -> None:
    """Make each callback once: what its constructor refuses is told now."""
    for section in config.trainer.callbacks or []:
        name = str(section.class_path).rpartition(".")[2]
        try:
            cli.built("callback", section)
        except Exception as error:
            finding = _from_error("model", error)
            found.findings.append(dataclasses.replace(finding, said=f"{name}: {finding.said}"))


def _model(cli: Any, config: Any, plan: int, found: Diagnosis) -> None:
    import torch

    from lit_methods.hub import weights_left_out

    module = None
    with weights_left_out() as weights:
        try:
            with torch.device("meta"):
                module = cli.built("model", config.model)
        except Exception as error:
            absent = any(not one.there for one in weights)
            unknown = Finding("model", UNKNOWN, f"can't be built for a look without them: {_short(error)}")
            found.findings.append(unknown if absent else _from_error("model", error))
    for one in dict.fromkeys(weights):
        here = f"{one.given}: here" if one.there else _absent(one.given, one.name)
        found.findings.append(Finding("weights", OK if one.there else MISSING, here))
    if module is None:
        return
    own = list(module.parameters())
    found.parameters = sum(p.numel() for p in own)
    bytes_of = {"weights": sum(_bytes(t) for t in {id(t): t for t in [*own, *module.buffers()]}.values())}
    try:
        optimisers = _optimisers(cli, module, config, plan)
    except Exception as error:
        found.findings.append(Finding("model", UNKNOWN, f"the optimiser couldn't be made without data and callbacks: {_short(error)}"))
        optimisers = []
    trained = {id(p): p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"] if p.requires_grad}
    if not optimisers:
        trained = {id(p): p for p in own if p.requires_grad}
    found.trained = sum(p.numel() for p in trained.values())
    bytes_of["gradients"] = sum(_bytes(p) for p in trained.values())
    bytes_of["optimiser"] = sum(_state(optimiser) for optimiser in optimisers)
    found.memory = bytes_of
    saved = sum(_bytes(tensor) for tensor in module.state_dict().values() if isinstance(tensor, torch.Tensor))
    found.checkpoint = saved + bytes_of["optimiser"]
    found.findings.append(Finding("model", OK, f"{type(module).__name__} can be built"))


def _absent(given: str, name: str) -> str:
    from lit_methods.hub import WEIGHTS

    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in WEIGHTS:
        return f"{given}: no such file or folder"
    return f"{given}: not in the hub's cache, and nothing is downloaded now: run `hf download {name}`, where there is a network"


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _optimisers(cli: Any, module: Any, config: Any, plan: int) -> list[Any]:
    """The module's optimisers; the trainer that it asks for the length of the training knows the plan."""
    trainer = _trainer(config, 1, plan)
    trainer.fit_loop.setup_data = lambda: None  # type: ignore[method-assign]
    trainer.strategy.connect(module)
    module.trainer = trainer
    optimiser = config.get("optimizer")
    if optimiser is not None:
        kind = cli.imported(optimiser.class_path)
        return [kind(module.parameters(), **dict(optimiser.get("init_args") or {}))]
    found = module.configure_optimizers()
    return list(_optimisers_in(found))


def _optimisers_in(found: Any) -> Iterator[Any]:
    import torch

    if isinstance(found, torch.optim.Optimizer):
        yield found
    elif isinstance(found, dict):
        yield from _optimisers_in(found["optimizer"])
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _optimisers_in(one)


def _state(optimiser: Any) -> int:
    """Bytes that an optimiser keeps, after one step without numbers: parameters and gradients are on the meta device."""
    import torch

    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    optimiser.step()
    kept = sum(_bytes(v) for state in optimiser.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    return kept


def _files_of_weights(config: Any, found: Diagnosis) -> None:
    """Files of weights that stand anywhere in the config: those of callbacks are read in ``setup`` alone."""
    from lit_methods.datamodules.folders import data_path
    from lit_methods.hub import WEIGHTS

    told = " ".join(finding.said for finding in found.findings)
    for key, value in _texts({name: config.get(name) for name in ("model", "trainer", "data")}):
        path = Path(os.path.expanduser(value))
        if path.suffix not in WEIGHTS or any(character in value for character in "*?{\n ") or value in told:
            continue
        of_data = key.startswith("data.")
        if of_data and "/" not in value:  # an ending of files in an archive
            continue
        there = data_path(value).exists() if of_data else path.exists()
        said = f"{key}={value}" + (": here" if there else ": no such file")
        found.findings.append(Finding("data" if of_data else "weights", OK if there else MISSING, said))


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str | Path):
        yield key, str(value)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{place}]")
    elif hasattr(value, "items"):
        for name, inner in vars(value).items() if not isinstance(value, dict) else value.items():
            yield from _texts(inner, f"{key}.{name}".removeprefix("."))


def _recipe(files: list[Path], config: Any, processes: int, found: Diagnosis) -> None:
    """Samples per step, beside those of the shipped recipe as it stands."""
    arguments = (config.get("data") or {}).get("init_args") or {}
    found.samples_per_step = _samples(arguments, processes, config.trainer.accumulate_grad_batches)
    from lit_methods.catalog import configs_folders

    for file in files:
        if any(file.parent == (folder / "full").resolve() or file.parent == folder / "full" for folder in configs_folders()):
            text = file.read_text(encoding="utf-8")
            shipped = yaml.safe_load(text)
            trainer = shipped.get("trainer") or {}
            own = trainer.get("devices", 1)
            count = (own if isinstance(own, int) else 1) * trainer.get("num_nodes", 1)
            inner = (shipped.get("data") or {}).get("init_args") or {}
            found.recipe_samples = _samples(inner, count, trainer.get("accumulate_grad_batches", 1))
            words = re.findall(r"^ +batch_size: \d+ +# (.*)$", text, flags=re.M)
            found.recipe_words = words[-1] if words else None


def _samples(arguments: Any, processes: int, accumulated: int) -> int | None:
    known = dict(arguments.items()) if hasattr(arguments, "items") else {}
    batch = known.get("batch_size")
    if batch is None and isinstance(known.get("classes_per_batch"), int):
        batch = known["classes_per_batch"] * known.get("samples_per_class", 1)
    return batch * processes * accumulated if isinstance(batch, int) else None


def _writes(config: Any, found: Diagnosis) -> None:
    from lit_methods.runs.folder import safe_name

    root = Path(os.path.expanduser(config.run_root))
    size = "" if found.checkpoint is None else f" ({_gigabytes(found.checkpoint)} each, at least)"
    saved = "" if config.trainer.get("enable_checkpointing") is False else f", checkpoints/{size}"
    found.writes = f"{root / safe_name(config.name)}/<time>/: {_FILES}{saved}"
    place = root.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        found.findings.append(Finding("disk", MISSING, f"{place} can't be written: give --run_root <folder>"))
        return
    free, needed = shutil.disk_usage(place).free, 3 * (found.checkpoint or 0)  # the last, the best, and one that is being written
    said = f"{_gigabytes(free)} free in {place}" + (f", about {_gigabytes(needed)} needed for checkpoints" if needed else "")
    found.findings.append(Finding("disk", OK if free > needed else MISSING, said + ("" if free > needed else ": give --run_root <folder>")))


# ---- words -----------------------------------------------------------------------------------------------------------------------------


def _from_error(what: str, error: Exception) -> Finding:
    """A finding out of what a constructor or reader says."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            return Finding("libraries", MISSING, _short(cause))
        if isinstance(cause, NotThereError) or (isinstance(cause, FileNotFoundError) and what == "model"):
            return Finding("weights", MISSING, _short(cause))
        cause = cause.__cause__ or cause.__context__
    return Finding(what, MISSING, _short(error))


def _short(error: BaseException) -> str:
    """What ``lit fit`` would say of an error, in one line."""
    from lit_methods.cli.explain import explain_run_error

    known = explain_run_error(error) if isinstance(error, Exception) else None
    own = isinstance(error, ValueError | OSError | ImportError | RuntimeError)
    said = str(known) if known is not None else str(error) if own else f"{type(error).__name__}: {error}"
    return " ".join(said.split())[:500] or type(error).__name__


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M" if number >= 1e4 else f"{number:,}"


def described(found: Diagnosis) -> str:
    """The diagnosis as text."""
    rows = [(finding.what, finding.state, finding.said) for finding in found.findings]
    if found.parameters is not None and found.trained is not None:
        rows.append(("parameters", "", f"{_count(found.parameters)}, {_count(found.trained)} trained, before callbacks change them"))
    if found.memory is not None:
        parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in found.memory.items())
        rows.append(("memory", "", f"{_gigabytes(sum(found.memory.values()))} per GPU: {parts}; and activations, and what callbacks hold"))
    each = "unknown" if found.steps_per_epoch is None else f"{found.steps_per_epoch:,}"
    total = "unknown" if found.total_steps is None else f"{found.total_steps:,}"
    epochs = "" if found.epochs is None else f" ({found.epochs:,} epochs)"
    rows.append(("steps", "", f"{each} an epoch, {total} in all{epochs}"))
    if found.samples_per_step is not None:
        said = f"{found.samples_per_step:,}"
        if found.recipe_samples is not None:
            words = f' ("{found.recipe_words}")' if found.recipe_words else ""
            ways = "batch_size, trainer.accumulate_grad_batches, or the learning rate"
            same = found.samples_per_step == found.recipe_samples
            said += f", as in the recipe{words}" if same else f"; the recipe has {found.recipe_samples:,}{words}: set {ways}"
        rows.append(("samples a step", "", said))
    rows.append(("writes", "", found.writes))
    width = max(len(what) for what, *_ in rows)
    lines = []
    for what, state, said in rows:
        label = f"{what:{width}}  {state:7}  "
        lines += textwrap.wrap(said, 140 - len(label), initial_indent=label, subsequent_indent=" " * len(label), break_long_words=False)
    count = len(found.missing)
    lines.append("everything is there" if not count else f"{count} thing{' is' if count == 1 else 's are'} missing")
    return "\n".join(lines)
