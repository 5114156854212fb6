"""From a study to the stages that have to run: one node for each different content, shared by all arms that begin alike."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_methods.catalog import configs_folder
from lit_methods.claims.fairness import ResolvedStage, flat
from lit_methods.claims.keys import config_file
from lit_methods.claims.study import TRAINS, Stage, Study
from lit_methods.errors import CommandError, suggest

# two training batches, and a validation behind each, whatever the config says: the metric that decides must be there
QUICK = {
    "max_epochs": "1",
    "limit_train_batches": "2",
    "limit_val_batches": "1",
    "check_val_every_n_epoch": "1",
    "val_check_interval": "1",  # in batches: an arm may end after its first step
}
QUICK_WORDS = [word for key, value in QUICK.items() for word in (f"--trainer.{key}", value)]
LIBRARIES = ("torch", "lightning", "numpy")


class MissingData(CommandError):
    """The data of a setting, or a library that it needs, isn't there: the setting is skipped, and the others run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=1)


@dataclass(eq=False)
class Node:
    """A stage for one seed.

    Attributes:
        key: Hash of everything that decides its result, our own sources left out.
        name: Folder name and what is shown: config, seed and key.
        words: Arguments of ``lit``, with ``{checkpoint}``.
        seed: Seed of the run.
        upstream: The stage whose checkpoint it takes, or None.
        arms: Arms that need it.
        kind: Config and seedless key: stages of the same kind take about the same time.
    """

    key: str
    name: str
    words: list[str]
    seed: int
    upstream: "Node | None"
    arms: list[str] = field(default_factory=list)
    kind: str = ""

    @property
    def fits(self) -> bool:
        """Whether it trains."""
        return self.words[0] in TRAINS


@dataclass(frozen=True)
class Plan:
    """What has to run.

    Attributes:
        nodes: All stages, upstream ones first.
        chains: Arm or report -> seed -> its stages in order.
        resolved: Arm -> its stages with resolved configs, of the first seed.
    """

    nodes: list[Node]
    chains: dict[str, dict[int, list[Node]]]
    resolved: dict[str, list[ResolvedStage]]


def stage_words(stage: Stage, seed: int, seed_keys: Sequence[str], extra: Sequence[str] = (), flops: bool = False) -> list[str]:
    """Arguments of ``lit`` for one stage, ``{checkpoint}`` left in.

    Args:
        stage: The stage as the file declares it.
        seed: Value of every key in ``seed_keys``.
        seed_keys: Keys that take the seed, such as ``seed_everything``.
        extra: Words from the command line; they win.
        flops: Count the operations of a training step, too.
    """

    def fill(value: Any) -> str:
        return json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)

    words = [stage.command, *(word for config in stage.configs for word in ("--config", f"configs/{config}"))]
    words += [word for key in seed_keys for word in (f"--{key}", str(seed))]
    words += [word for key, value in stage.set.items() for word in (f"--{key}", fill(value))]
    words += list(extra)
    words += [f"--trainer.callbacks+={name}" for name in stage.callbacks]
    if stage.command == "fit":
        words += ["--trainer.callbacks+=StepCost", *(["--trainer.callbacks.flops", "true"] if flops else [])]
    return words + (["--ckpt_path", stage.checkpoint] if stage.checkpoint else [])


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions, read without importing."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def resolve_configs(commands: Mapping[str, list[str]], threads: int) -> dict[str, dict[str, Any]]:
    """What ``--print_config`` says to each command, all of them in one process.

    Args:
        commands: Name for messages -> arguments of ``lit``.
        threads: Torch threads of that process.

    Raises:
        MissingData: One of them needs a library that isn't installed.
        CommandError: One of them is refused; the message holds what ``lit`` said.
    """
    for name, words in commands.items():
        for given in (words[index + 1] for index, word in enumerate(words) if word == "--config"):
            if config_file(given) is None:  # said at once: the process below takes seconds to start
                known = [
                    f"configs/{path.relative_to(base).as_posix()}"
                    for base in (Path("configs"), configs_folder())
                    for path in base.rglob("*.yaml")
                ]
                raise CommandError(f"{name}: there is no {given}, neither here nor among the shipped configs{suggest(given, known)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "commands.json"
        file.write_text(json.dumps(list(commands.values())), encoding="utf-8")
        command = [sys.executable, "-m", "lit_methods.cli.stage", "resolve", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(f"the configs can't be resolved\n{done.stderr[-2000:]}", exit_code=1)
        answers = json.loads(file.read_text(encoding="utf-8"))
    configs = {}
    for (name, words), answer in zip(commands.items(), answers, strict=True):
        if answer.get("missing"):
            raise MissingData(answer["missing"])
        if "error" in answer:
            raise CommandError(f"{name} can't be resolved: lit {' '.join(words)}\n{answer['error']}")
        configs[name] = answer["config"]
    return configs


def make_plan(study: Study, seeds: Sequence[int], extra: Sequence[str], resolve: Any = resolve_configs) -> Plan:
    """All stages of a study, with their keys.

    A key covers: the command, its resolved config (so also what the files hold), the seed, the stage before, threads, and the versions of
    torch, Lightning and numpy. Our own sources are no part of it: a result records those that its run imported.

    Args:
        study: What the file declares.
        seeds: Seeds to run, the first of which is the one that configs are resolved with.
        extra: Words for every stage.
        resolve: :func:`resolve_configs`, or a function of its form.
    """
    flops = "flops" in study.units
    stages: dict[str, list[Stage]] = {arm: list(chain) for arm, chain in study.arms.items()}
    for report in study.reports:
        if report.stage is not None:
            stages[f"report: {report.name}"] = [*study.arms[report.arm], report.stage]
    owners = {arm: arm for arm in study.arms} | {f"report: {report.name}": report.arm for report in study.reports}

    def words_of(stage: Stage, seed: int) -> list[str]:
        return stage_words(stage, seed, study.seed_keys, extra, flops)

    commands: dict[str, list[str]] = {}
    for name, chain in stages.items():
        for index, stage in enumerate(chain):
            words = words_of(stage, seeds[0])
            if words not in commands.values():
                commands[f"{name}, stage {index + 1}"] = words
    answers = resolve(commands, study.threads)
    configs = {json.dumps(words): answers[name] for name, words in commands.items()}

    nodes: dict[str, Node] = {}
    chains: dict[str, dict[int, list[Node]]] = {}
    for seed in seeds:
        for name, chain in stages.items():
            upstream: Node | None = None
            line: list[Node] = []
            for stage in chain:
                config = configs[json.dumps(words_of(stage, seeds[0]))]
                node = _node(stage, words_of(stage, seed), config, seed, upstream, study)
                node = nodes.setdefault(node.key, node)
                if owners[name] not in node.arms:
                    node.arms.append(owners[name])
                line.append(node)
                upstream = node
            chains.setdefault(name, {})[seed] = line
    resolved = {
        name: [ResolvedStage(stage.command, configs[json.dumps(words_of(stage, seeds[0]))], tuple(stage.set)) for stage in chain]
        for name, chain in stages.items()
    }
    return Plan(list(nodes.values()), chains, resolved)


def _node(stage: Stage, words: list[str], config: Mapping[str, Any], seed: int, upstream: Node | None, study: Study) -> Node:
    seedless = {key: value for key, value in flat(config).items() if key not in study.seed_keys}
    chosen_seeds = {key: value for key, value in stage.set.items() if key in study.seed_keys}
    content = [stage.command, seedless, chosen_seeds, study.threads, library_versions()]
    kind = digest([*content, upstream.kind if upstream else ""])
    key = digest([*content, seed, upstream.key if upstream else ""])
    stem = Path(stage.configs[0]).stem
    return Node(key, f"{stem}-{'' if stage.command == 'fit' else stage.command + '-'}s{seed}-{key}", words, seed, upstream, kind=kind)


def digest(content: Any) -> str:
    """Twelve hex digits that stand for any JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
