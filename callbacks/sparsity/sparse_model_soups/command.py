"""``lit soup``: the phases of IMP with several candidates each, as ordinary ``lit fit`` runs, averaged after every phase.

What is run and averaged is a plan of rounds (:func:`make_rounds`); what has been done stands in ``manifest.json``. Nothing here imports
torch before a command is known to be one.
"""

import argparse
import copy
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError, suggest
from lit_methods.files import write_atomically, write_json

if TYPE_CHECKING:
    from lit_methods.callbacks.sparsity.sparse_model_soups.kitchen import Kitchen

MANIFEST = "manifest.json"
BASELINES = ("imp", "imp_longer", "imp_reprune", "imp_avg")
DESCRIPTION = """\
Sparse Model Soups: prunes in phases, retrains several candidates of each pruned model, and goes on with their average. The config is one
for lit fit with the callback IMP; every run is an ordinary lit fit run below the soup's folder. The same command goes on where it was
stopped: finished runs are kept, a killed one resumes from its last checkpoint."""
EPILOG = """\
All other words are those of lit fit: --config FILE, --trainer.KEY VALUE, ...

  lit soup --config configs/sparse_model_soups.yaml --jobs 2
  lit soup --config mine.yaml --vary model.init_args.weight_decay --values 0 1e-4 5e-4 --soup greedy --metric val_acc
  lit soup --config mine.yaml --slurm          writes array jobs, and submit.sh, which submits all phases

What comes out: <run_root>/<name>/<time>/ with manifest.json, and checkpoints/last.ckpt, the last soup, which lit test and lit export take.
Exit status: 0 done, 1 a run failed or data are missing, 2 a mistake in the arguments or in the folder."""


def _parser() -> Parser:
    parser = Parser(
        prog="lit soup", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--candidates", type=int, help="models that are retrained in each phase (default: 3, or one for each of --values)")
    parser.add_argument(
        "--vary",
        default="seed",
        metavar="KEY",
        help="what differs between them: seed, an argument of IMP such as retrain_epochs or peak, or a key such as "
        "model.init_args.weight_decay (default: %(default)s)",
    )
    parser.add_argument("--values", nargs="+", metavar="V", help="of that key, one for each candidate")
    parser.add_argument(
        "--seed_keys", nargs="+", metavar="KEY", default=["seed_everything", "data.init_args.seed"], help="what a seed sets"
    )
    parser.add_argument("--soup", choices=("uniform", "greedy"), default="uniform", help="average all, or those that help (%(default)s)")
    parser.add_argument("--metric", default="classifier/val_accuracy", help="validation metric that scores models (default: %(default)s)")
    parser.add_argument("--lower", action="store_true", help="lower is better")
    parser.add_argument("--bn_fraction", type=float, default=0.2, help="share of the training batches that recalibrates batch norms (0.2)")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=[], help="run these too, from the same dense model")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; results don't depend on it")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a run (default: %(default)s)")
    parser.add_argument("--run_root", type=Path, default=Path("runs"), help="folder that holds all runs (default: %(default)s)")
    parser.add_argument("--name", help="name of the soup's folder; default: stem of the first config and -soup")
    parser.add_argument("--fresh", action="store_true", help="start anew, whatever an earlier command has done")
    parser.add_argument("--plan", action="store_true", help="list what would run, and stop")
    parser.add_argument("--print_config", action="store_true", help="print config and settings, and stop")
    parser.add_argument("--slurm", action="store_true", help="run nothing: write array jobs and submit.sh")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="only average what is finished in a soup's folder (the jobs do that)")
    return parser


# ---- the plan --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One ``lit fit`` run.

    Attributes:
        name: Its folder below the soup's.
        start: Name of the soup that it starts from; "": what the config says.
        epochs: How long it trains.
        seed: Added to the config's seeds.
        changes: Key -> value, as in ``--vary``.
    """

    name: str
    start: str
    epochs: int
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Soup:
    """What is made of finished runs: ``<name>.ckpt``.

    Attributes:
        name: Place of the file below the soup's folder, without ``.ckpt``.
        members: The runs.
        kind: ``uniform``, ``greedy``, or ``reprune``: models with different masks are averaged and pruned again.
    """

    name: str
    members: tuple[Fit, ...]
    kind: str = "uniform"


def make_rounds(settings: Mapping[str, Any], imp: Mapping[str, Any], done: int = 0) -> list[list[Soup]]:
    """Soups in rounds: those of a round need runs that start from soups of earlier rounds alone.

    Args:
        settings: ``candidates``, ``vary``, ``values``, ``soup``, ``baselines``.
        imp: Arguments of the callback: ``phases``, ``retrain_epochs``, ``dense_epochs``, ``start``.
        done: Phases that the callback's ``start`` has behind it.
    """
    count, phases, baselines = settings["candidates"], imp["phases"], settings["baselines"]
    values = settings["values"] or [None] * count
    changes = [{} if value is None else {settings["vary"]: value} for value in values]
    epochs = [change.get("retrain_epochs", imp["retrain_epochs"]) for change in changes]

    def retrained(name: str, start: str, phase: int, place: int, length: int | None = None) -> Fit:
        return Fit(name, start, epochs[place] if length is None else length, 1 + (phase - 1) * count + place, changes[place])

    rounds: list[list[Soup]] = []
    dense = "dense" if imp["dense_epochs"] else ""
    if dense:
        rounds.append([Soup(dense, (Fit("dense", "", imp["dense_epochs"], 0),))])
    last = phases
    for phase in range(done + 1, phases + 1):
        first = phase == done + 1

        def behind(chain: str, phase: int = phase, first: bool = first) -> str:
            return dense if first else chain.format(phase - 1)

        soup = Soup(
            f"phase{phase}/soup",
            tuple(retrained(f"phase{phase}/candidate{i}", behind("phase{}/soup"), phase, i) for i in range(count)),
            settings["soup"],
        )
        here = [soup]
        # in the first phase the chains' runs are the candidates themselves
        imp_fit = soup.members[0] if first else retrained(f"imp/phase{phase}", behind("imp/phase{}"), phase, 0)
        if {"imp", "imp_reprune", "imp_avg"} & set(baselines):
            here.append(Soup(f"imp/phase{phase}", (imp_fit,)))
        if "imp_longer" in baselines:
            longer = retrained(f"imp_longer/phase{phase}", behind("imp_longer/phase{}"), phase, 0, sum(epochs))
            here.append(Soup(longer.name, (longer,)))
        if "imp_reprune" in baselines:
            chains = [f"imp_reprune/chain{i}/phase{{}}" for i in range(1, count)]
            own = [retrained(chain.format(phase), behind(chain), phase, i) for i, chain in enumerate(chains, start=1)]
            fits = soup.members[1:] if first else own
            if phase == last:
                here.append(Soup("imp_reprune/soup", (imp_fit, *fits), "reprune"))
            else:
                here += [Soup(chain.format(phase), (fit,)) for chain, fit in zip(chains, fits, strict=True)]
        if "imp_avg" in baselines and phase == last:
            own = [retrained(f"imp_avg/candidate{i}", behind("imp/phase{}"), phase, i) for i in range(1, count)]
            others = soup.members[1:] if first else own
            here.append(Soup("imp_avg/soup", (imp_fit, *others), settings["soup"]))
        rounds.append(here)
    return rounds


def fits_of(soups: Sequence[Soup]) -> list[Fit]:
    """The runs of some soups, each once."""
    return list({fit.name: fit for soup in soups for fit in soup.members}.values())


# ---- configs ---------------------------------------------------------------------------------------------------------------------------


def imp_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the config's one IMP.

    Raises:
        CommandError: It has none, or several.
    """
    found = [one for one in config["trainer"]["callbacks"] if one["class_path"].rpartition(".")[2] == "IMP"]
    if len(found) != 1:
        raise CommandError(
            f"lit soup needs a config with one callback IMP, and this one has {len(found)}: see configs/sparse_model_soups.yaml"
        )
    arguments: dict[str, Any] = found[0].setdefault("init_args", {})
    return arguments


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set an argument of IMP, by its bare name, or a dotted key that the config has; ``init_args`` may be left out.

    Raises:
        CommandError: There is no such key.
    """
    tree: Any = imp_arguments(config) if key in imp_arguments(config) else config
    *above, last = key.split(".")
    for part in [*above, None]:
        if isinstance(tree, dict) and (last if part is None else part) not in tree and isinstance(tree.get("init_args"), dict):
            tree = tree["init_args"]
        tree = tree if part is None else tree.get(part) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or last not in tree:
        known = ["seed", *imp_arguments(config), *(list(tree) if isinstance(tree, dict) else [])]
        raise CommandError(f"the config has no key {key!r} to vary{suggest(last, known)}")
    tree[last] = value


def has_key(config: dict[str, Any], key: str) -> bool:
    """Whether a dotted key is there and a number."""
    tree: Any = config
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return isinstance(tree, int)


def fit_config(config: Mapping[str, Any], fit: Fit, start: Path | None, seed_keys: Sequence[str]) -> dict[str, Any]:
    """The config of one run.

    Args:
        config: The soup's, resolved.
        fit: The run.
        start: Checkpoint that it begins with; None: what the config says.
        seed_keys: What a seed sets, where the config has it.
    """
    made = copy.deepcopy(dict(config))
    for key in ("name", "run_root", "resume", "ckpt_path"):
        made.pop(key, None)
    for key, value in fit.changes.items():
        set_key(made, key, value)
    for key in seed_keys:
        if has_key(made, key):
            *above, last = key.split(".")
            tree = made
            for part in above:
                tree = tree[part]
            tree[last] += fit.seed
    imp = imp_arguments(made)
    if fit.seed:  # of a phase: the dense run has none
        imp |= {"retrain_epochs": fit.epochs, "dense_epochs": 0}
    if start is not None:
        imp["start"] = str(start)
    trainer = made["trainer"]
    trainer |= {"max_epochs": fit.epochs, "max_steps": -1, "min_epochs": None, "min_steps": None}
    if not any(one["class_path"].endswith(".StepCost") for one in trainer["callbacks"]):
        trainer["callbacks"].append({"class_path": "lit_methods.callbacks.StepCost"})
    return made


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def soup(argv: list[str]) -> int:
    """``lit soup --config <config>``."""
    parser = _parser()
    if not argv or {"--help", "-h"} & set(argv):
        parsed(parser, ["--help"])
        return 0 if argv else 2
    options, words = parser.parse_known_args(argv)
    if options.merge is not None:
        if words:
            raise CommandError(f"--merge takes the folder alone, which knows its config: leave out {' '.join(words)}")
        return Cook(options.merge).merge_what_is_there()
    if not any(word.partition("=")[0] in ("--config", "-c", "--model") for word in words):
        raise CommandError("lit soup needs a config: lit soup --config configs/sparse_model_soups.yaml")
    settings = _settings(options)
    config, stem = _resolved(words)
    imp = imp_arguments(config)
    for value in settings["values"] or ():
        set_key(copy.deepcopy(config), settings["vary"], value)  # refuses a key that isn't there
    if options.print_config:
        print(yaml.safe_dump(config | {"soup": settings}, sort_keys=False, allow_unicode=True), end="")
        return 0
    rounds = make_rounds(settings, imp, _phases_done(imp))
    if not rounds:
        raise CommandError(f"start={imp['start']!r} has all {imp['phases']} phases behind it: nothing is left to prune")
    if options.plan:
        for number, soups in enumerate(rounds):
            runs = ", ".join(f"{fit.name} ({fit.epochs} epochs)" for fit in fits_of(soups))
            print(f"round {number}: {runs}\n  then {', '.join(f'{one.name} ({one.kind})' for one in soups)}")
        return 0
    folder, said = _folder(options.run_root, options.name or f"{stem}-soup", config, settings, options.fresh)
    if said:
        print(said)
        return 0
    cook = Cook(folder)
    if options.slurm:
        cook.write_jobs()
        return 0
    return cook.cook(options.jobs, options.threads)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What makes a soup what it is, checked."""
    values = [_value(text) for text in options.values] if options.values else None
    count = options.candidates if options.candidates is not None else len(values or (1, 2, 3))
    if count < 1 or options.jobs < 1 or options.threads < 1:
        raise CommandError(f"--candidates, --jobs and --threads must be 1 or more, got {count}, {options.jobs}, {options.threads}")
    if not 0 < options.bn_fraction <= 1:
        raise CommandError(f"--bn_fraction is a share of the training batches, in (0, 1], got {options.bn_fraction}")
    if options.vary == "seed" and values:
        raise CommandError("--vary seed takes no --values: candidates get the seeds that follow the config's")
    if options.vary != "seed" and len(values or ()) != count:
        raise CommandError(f"--vary {options.vary} needs one of --values for each of {count} candidates, got {len(values or ())}")
    if options.vary in ("sparsity", "phases", "selector", "targets", "skip", "dense_epochs", "start"):
        raise CommandError(
            f"--vary {options.vary}: candidates must share their mask, vary seed, retrain_epochs, peak or a key of the model"
        )
    same = ("vary", "seed_keys", "soup", "metric", "lower", "bn_fraction")
    return {"candidates": count, "values": values, "baselines": sorted(options.baselines)} | {key: getattr(options, key) for key in same}


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    try:
        return float(text) if isinstance(value, str) else value  # 1e-4 is text to YAML
    except ValueError:
        return value


def _resolved(words: list[str]) -> tuple[dict[str, Any], str]:
    """The config as ``lit fit --print_config`` would show it, and the stem of its first file."""
    from lit_methods.cli.lightning_cli import planned
    from lit_methods.cli.quiet import quiet

    with quiet("lightning.pytorch", "lightning.fabric"):
        cli, files = planned(["fit", *words])
    if cli.config["fit"].get("ckpt_path"):
        raise CommandError("lit soup takes no --ckpt_path: give IMP the dense model as start, --trainer.callbacks.start FILE")
    text = cli._parser("fit").dump(cli.config["fit"], skip_none=False, format="yaml")
    config: dict[str, Any] = yaml.safe_load(text)
    callbacks = config["trainer"].get("callbacks") or []
    config["trainer"]["callbacks"] = callbacks if isinstance(callbacks, list) else [callbacks]
    if config.get("data") is None:
        raise CommandError("the config has no data section: candidates are scored on its validation data")
    return config, files[0].stem if files else "model"


def _phases_done(imp: Mapping[str, Any]) -> int:
    """Phases that ``start`` has behind it."""
    if not imp.get("start"):
        return 0
    from lit_methods.callbacks.sparsity.sparse_model_soups.kitchen import imp_state

    start = Path(imp["start"])
    if not start.is_file():
        raise CommandError(f"start={str(start)!r} of IMP doesn't exist: give a checkpoint of the dense model, or dense_epochs", exit_code=1)
    return int(imp_state(start).get("phase", 0))


def _folder(root: Path, name: str, config: dict[str, Any], settings: dict[str, Any], fresh: bool) -> tuple[Path, str]:
    """The soup's folder, an earlier one with the same config and settings or a new one; and what to say if nothing is left to do."""
    from lit_methods.cli.resume import differing_keys
    from lit_methods.runs.folder import claim_run_folder, safe_name

    wanted = {"settings": settings, "config": config}
    for folder in sorted((root / safe_name(name)).glob("*/"), reverse=True):
        if fresh or not (folder / MANIFEST).is_file():
            continue
        there = read_manifest(folder)
        changed = differing_keys({key: there[key] for key in wanted}, wanted)
        changed = [key for key in changed if key.rpartition(".")[2] not in ("name", "run_root", "resume")]
        if changed:
            print(f"{folder} is left out, it differs: {', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''}", file=sys.stderr)
        elif there["finished"]:
            return folder, f"{folder} has finished: nothing is left to do (--fresh runs it anew)\n{table(there)}"
        else:
            print(f"goes on in {folder}", flush=True)
            return folder, ""
    folder = claim_run_folder(root, name)
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(
        folder / MANIFEST,
        {"version": 1, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **wanted, "runs": {}, "soups": {}, "finished": False},
    )
    print(f"soup's folder: {folder}", flush=True)
    return folder, ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a soup's folder.

    Raises:
        CommandError: It isn't there, or can't be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not {"settings", "config", "runs", "soups", "finished"} <= set(manifest):
            raise ValueError("keys are missing")
    except FileNotFoundError as error:
        raise CommandError(f"{folder} has no {MANIFEST}: give the folder of a soup, <run_root>/<name>/<time>") from error
    except ValueError as error:
        raise CommandError(f"{folder / MANIFEST} can't be read ({error}): put it back, or move the folder away to start anew") from error
    return manifest


class Cook:
    """Goes through the rounds of a soup's folder.

    Args:
        folder: With ``manifest.json`` and ``config.yaml``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.manifest = read_manifest(folder)
        self.settings, self.config = self.manifest["settings"], self.manifest["config"]
        imp = imp_arguments(self.config)
        self.rounds = make_rounds(self.settings, imp, _phases_done(imp))
        self._kitchen: Kitchen | None = None

    @property
    def kitchen(self) -> "Kitchen":
        """Where models are scored and averaged; it builds model and data when it is first needed."""
        if self._kitchen is None:
            from lit_methods.callbacks.sparsity.sparse_model_soups.kitchen import Kitchen

            self._kitchen = Kitchen(self.folder / "config.yaml", self.settings)
        return self._kitchen

    def checkpoint(self, soup: str) -> Path:
        """File of a soup."""
        return self.folder / f"{soup}.ckpt"

    def is_made(self, soup: Soup) -> bool:
        """Whether a soup is there."""
        return soup.name in self.manifest["soups"] and self.checkpoint(soup.name).is_file()

    def cook(self, jobs: int, threads: int) -> int:
        """Run and average everything that isn't done; exit status."""
        from lit_methods.callbacks.sparsity.sparse_model_soups.runs import run_fits
        from lit_methods.claims.runner import stops_on_sigterm
        from lit_methods.runs.folder import lock_run

        lock = lock_run(self.folder)
        if lock is None:
            raise CommandError(f"another command is at work in {self.folder}: wait for it, or start anew with --fresh")
        try:
            with lock, stops_on_sigterm():
                for soups in self.rounds:
                    missing = [soup for soup in soups if not self.is_made(soup)]
                    self.check_recorded(missing)
                    fits = fits_of(missing)
                    self.write_configs(fits)
                    run_fits(self.folder, fits, jobs, threads, self.note_run)
                    self.mix(missing)
        except KeyboardInterrupt:
            print(f"\nstopped; what is finished is kept in {self.folder}. The same command goes on")
            return 130
        self.conclude()
        return 0

    def merge_what_is_there(self) -> int:
        """Average what is finished; 1 where runs are still to come."""
        from lit_methods.callbacks.sparsity.sparse_model_soups.runs import finished_run

        for soups in self.rounds:
            missing = [soup for soup in soups if not self.is_made(soup)]
            self.check_recorded(missing)
            waiting = []
            for fit in fits_of(missing):
                run = finished_run(self.folder / fit.name)
                if run is None:
                    waiting.append(fit.name)
                else:
                    self.note_run(fit.name, run)
            if waiting:
                print(f"not finished: {', '.join(waiting)}")
                return 1
            made = bool(missing)
            self.mix(missing)
            if made and soups is not self.rounds[-1]:
                return 0  # the next round's runs can start
        self.conclude()
        return 0

    def write_configs(self, fits: Sequence[Fit]) -> None:
        """``config.yaml`` of each run."""
        for fit in fits:
            start = self.checkpoint(fit.start) if fit.start else None
            made = fit_config(self.config, fit, start, self.settings["seed_keys"])
            (self.folder / fit.name).mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / fit.name / "config.yaml", yaml.safe_dump(made, sort_keys=False, allow_unicode=True))

    def check_recorded(self, soups: Sequence[Soup]) -> None:
        """Raise if a run that the manifest has as finished, and that is still needed, has lost its checkpoint.

        Raises:
            CommandError: It has. Where its whole folder is gone, it is run again.
        """
        for fit in fits_of(soups):
            entry = self.manifest["runs"].get(fit.name)
            if entry is None:
                continue
            file, home = self.folder / entry["checkpoint"], self.folder / fit.name
            if home.is_dir() and not file.is_file():
                raise CommandError(
                    f"{fit.name} is finished in {self.folder / MANIFEST}, but {file} is gone\n"
                    f"  put it back, or delete {home}, and the run is done again"
                )

    def note_run(self, name: str, run: Path) -> None:
        """Record a finished run."""
        checkpoint = run / "checkpoints" / "last.ckpt"
        if not checkpoint.is_file():
            raise CommandError(f"{run} has no checkpoints/last.ckpt: give its ModelCheckpoint save_last: true", exit_code=1)
        fit = next(fit for soups in self.rounds for fit in fits_of(soups) if fit.name == name)
        cost = run / "cost.json"
        entry = {"checkpoint": str(checkpoint.relative_to(self.folder)), "start": fit.start, "epochs": fit.epochs, "seed": fit.seed}
        entry["changes"] = fit.changes
        entry |= json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else {}
        for key in ("seconds", "data_seconds", "memory"):
            entry.pop(key, None)
        self.manifest["runs"][name] = entry
        write_json(self.folder / MANIFEST, self.manifest)

    def mix(self, soups: Sequence[Soup]) -> None:
        """Average the runs of some soups, each of which is recorded when its file is there."""
        for soup in soups:
            files = {fit.name: self.folder / self.manifest["runs"][fit.name]["checkpoint"] for fit in soup.members}
            found = self.kitchen.mix(files, soup.kind, self.checkpoint(soup.name))
            self.manifest["soups"][soup.name] = {"members": list(files), "kind": soup.kind, **found}
            write_json(self.folder / MANIFEST, self.manifest)
            parts = ", ".join(f"{value:.4g}" for value in found["candidates"].values())
            print(f"{soup.name}: {found['value']:.4g} of {parts}; {found['sparsity']:.2%} pruned", flush=True)

    def conclude(self) -> None:
        """Write what a run's folder has: the last soup as checkpoint, metrics, cost; and show the table."""
        figures, last = figures_of(self.manifest, self.rounds), self.rounds[-1][0].name
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        copied = self.folder / "checkpoints" / ".last.ckpt.tmp"
        shutil.copyfile(self.checkpoint(last), copied)
        copied.replace(self.folder / "checkpoints" / "last.ckpt")
        runs = self.manifest["runs"].values()
        steps = sum(run.get("steps", 0) for run in runs)
        metrics = {f"sparse_model_soups/{name}": value for name, value in figures.items()}
        write_atomically(self.folder / "metrics.jsonl", json.dumps({"step": steps, "metrics": metrics}) + "\n")
        cost = {"steps": steps, "batches": sum(run.get("batches", 0) for run in runs), "flops_per_batch": None, "interrupted": False}
        write_json(self.folder / "cost.json", cost | {"parameters": max((run.get("parameters", 0) for run in runs), default=0)})
        self.manifest |= {"finished": True, "last": last, "figures": figures}
        write_json(self.folder / MANIFEST, self.manifest)
        print(f"\n{table(self.manifest)}\nsoup: {self.folder / 'checkpoints' / 'last.ckpt'}")

    def write_jobs(self) -> None:
        """A SLURM array job for each round, and ``submit.sh``, which submits all of them, each behind the one before."""
        jobs = self.folder / "jobs"
        jobs.mkdir(exist_ok=True)
        lines = [
            "#!/bin/bash",
            "# All rounds of the soup. Words for the runs' jobs: bash submit.sh --gpus=1 --time=4:00:00",
            "set -euo pipefail",
            'after=""',
        ]
        merge = shlex.quote(f"lit soup --merge {shlex.quote(str(self.folder))}")
        for number, soups in enumerate(self.rounds):
            missing = [soup for soup in soups if not self.is_made(soup)]
            fits = fits_of(missing)
            if not fits:
                continue
            self.write_configs(fits)
            names = " ".join(shlex.quote(fit.name) for fit in fits)
            file = jobs / f"round{number}.sh"
            text = f"#!/bin/bash\nnames=({names})\nrun={shlex.quote(str(self.folder))}/${{names[$SLURM_ARRAY_TASK_ID]}}\n"
            text += 'exec srun lit fit --config "$run/config.yaml" --run_root "$run" --name run --resume auto\n'
            write_atomically(file, text)
            given = f'--array=0-{len(fits) - 1} --output={shlex.quote(str(jobs))}/%A_%a.txt "$@" {shlex.quote(str(file))}'
            lines.append(f"runs=$(sbatch --parsable ${{after:+--dependency=afterok:$after}} {given})")
            lines.append(f"after=$(sbatch --parsable --dependency=afterok:$runs --output={shlex.quote(str(jobs))}/%j.txt --wrap {merge})")
        write_atomically(self.folder / "submit.sh", "\n".join(lines) + "\n")
        print(f"bash {self.folder / 'submit.sh'}   submits {len(self.rounds)} rounds; words behind it go to the runs' sbatch")


def figures_of(manifest: Mapping[str, Any], rounds: Sequence[Sequence[Soup]]) -> dict[str, float]:
    """The figures that a soup is told by: name -> value."""
    soups, main = manifest["soups"], rounds[-1][0].name
    last, sign = soups[main], -1.0 if manifest["settings"]["lower"] else 1.0
    values = list(last["candidates"].values())
    figures = {
        "soup": last["value"],
        "best_candidate": sign * max(sign * value for value in values),
        "mean_candidate": sum(values) / len(values),
        "sparsity": last["sparsity"],
        **{name: last[name] for name in ("ensemble", "agreement") if last.get(name) is not None},
        **last["reliability"],
        **last["diversity"],
    }
    if "dense" in soups:
        figures["dense"] = soups["dense"]["value"]
    phases = imp_arguments(manifest["config"])["phases"]
    ends = {
        "imp": f"imp/phase{phases}",
        "imp_longer": f"imp_longer/phase{phases}",
        "imp_reprune": "imp_reprune/soup",
        "imp_avg": "imp_avg/soup",
    }
    figures |= {name: soups[ends[name]]["value"] for name in manifest["settings"]["baselines"]}
    for soup in (found[0] for found in rounds if found[0].name.startswith("phase")):
        phase = soup.name.partition("/")[0]
        entry = soups[soup.name]
        figures[f"{phase}_soup"] = entry["value"]
        figures[f"{phase}_mean_candidate"] = sum(entry["candidates"].values()) / len(entry["candidates"])
    return figures


def table(manifest: Mapping[str, Any]) -> str:
    """The figures of a finished soup, a line each."""
    head = f"{manifest['settings']['metric']}, batch norms recalibrated everywhere"
    return "\n".join([head, *(f"  {name:28}{value:.4f}" for name, value in manifest["figures"].items())])
