"""``lit sweep``: many runs of one config whose keys are drawn, by optuna, from a file in W&B's format. Imports no torch."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_methods.claims.runner import stops_on_sigterm
from lit_methods.cli.claims import split_words
from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError
from lit_methods.files import try_lock

if TYPE_CHECKING:
    from lit_methods.sweeps.definition import Sweep
    from lit_methods.sweeps.launch import Launcher
    from lit_methods.sweeps.study import Study

CLUSTERS = ("slurm", "local", "debug")


def _parser() -> Parser:
    parser = Parser(
        prog="lit sweep",
        description="Run one config with many values of its keys, as a file in W&B's sweep format says (method, metric, parameters, "
        "early_terminate, command: [lit, fit, --config, ...]). The same call goes on with what an interrupted one has left.",
        epilog="Further words for every trial: --data.KEY VALUE, --model.KEY VALUE, --trainer.KEY VALUE.",
    )
    parser.add_argument("file", help="such as my_sweep.yaml; `wandb sweep` takes it, too")
    parser.add_argument("--trials", type=int, help="trials in all, those of before included (default: run_cap of the file; a grid: all)")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--devices", nargs="+", default=[], metavar="GPU", help="ids of GPUs; each trial sees one of them")
    parser.add_argument("--root", type=Path, default=Path("runs/sweeps"), help="parent of the sweep's folder (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run failed trials once more")
    parser.add_argument("--plan", action="store_true", help="check the file and its keys, say what would run, run nothing")
    parser.add_argument("--cluster", choices=CLUSTERS, help="trials are jobs: slurm; local and debug to try it out here")
    parser.add_argument("--partition", help="of SLURM")
    parser.add_argument("--minutes", type=int, default=60, help="time of a job; one that needs more is queued again and goes on")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a job")
    parser.add_argument("--cpus", type=int, default=4, help="CPU cores of a job")
    return parser


def sweep(words: list[str]) -> int:
    """``lit sweep <file>``."""
    ours, passed = split_words(words)
    options = parsed(_parser(), ours)
    if options is None:
        return 0
    from lit_methods.sweeps.definition import read_sweep

    for name, least in (("trials", 1), ("jobs", 1), ("minutes", 1), ("gpus", 0), ("cpus", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise CommandError(f"--{name} is {value}: give {least} or more")
    if options.devices and options.cluster:
        raise CommandError("give --devices for processes of this machine, or --cluster with --gpus")
    declared = read_sweep(Path(options.file).expanduser())
    total = options.trials or declared.cap
    if declared.method == "grid":
        declared.grid()  # says which parameter has no end of values
    elif total is None:
        raise CommandError(f"method {declared.method} draws without an end: give --trials, or run_cap in {options.file}")
    _check_keys(declared, passed)
    folder = options.root.expanduser() / declared.name
    if options.plan:
        return _plan(declared, total, folder, passed)
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / "lock")
    if lock is None:
        raise CommandError(f"another lit sweep is at work in {folder}", exit_code=1)
    with lock:
        return _run(declared, total, folder, passed, options, words)


def _check_keys(declared: "Sweep", passed: list[str]) -> None:
    """Let ``lit`` resolve the first values' config, so that a wrong key is said before anything runs."""
    from lit_methods.claims.plan import resolve_configs

    first = {parameter.key: parameter.values[0] if parameter.values else _low(parameter) for parameter in declared.parameters}
    resolve_configs({"the first trial": [*declared.trial_words(first), *passed]}, threads=1)


def _low(parameter: Any) -> float | int:
    return round(parameter.low) if parameter.distribution == "int_uniform" else float(parameter.low)


def _plan(declared: "Sweep", total: int | None, folder: Path, passed: list[str]) -> int:
    for parameter in declared.parameters:
        between = f"{parameter.low:g} to {parameter.high:g}"
        print(f"  {parameter.key}: {', '.join(map(str, parameter.values)) if parameter.values else f'{parameter.distribution}, {between}'}")
    count = len(declared.grid()) if declared.method == "grid" else total
    count = min(count, total) if count is not None and total is not None else count
    print(f"{count} trials by {declared.method}, {declared.goal} {declared.metric}, in {folder}")
    print(f"  lit {shlex.join([*declared.words, '--KEY=VALUE', '...', *passed])}")
    return 0


def _run(declared: "Sweep", total: int | None, folder: Path, passed: list[str], options: Any, words: list[str]) -> int:
    from lit_methods.sweeps.search import search
    from lit_methods.sweeps.study import Study

    study = Study(declared, folder, options.jobs)
    if options.again:
        print(f"{study.again()} failed trials again")
    launcher = _launcher(folder, options)
    try:
        with stops_on_sigterm():
            search(study, launcher, total, options.jobs, passed, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print(f"\nstopped; what has finished is kept. Go on: lit sweep {shlex.join(words)}")
        return 130
    return _tell(study.summary(), study, folder)


def _launcher(folder: Path, options: Any) -> "Launcher":
    from lit_methods.sweeps.launch import Jobs, Processes

    if not options.cluster:
        return Processes(options.devices)
    asked = {"timeout_min": options.minutes, "gpus_per_node": options.gpus, "cpus_per_task": options.cpus, "nodes": 1, "tasks_per_node": 1}
    slurm = {"slurm_array_parallelism": options.jobs, **({"slurm_partition": options.partition} if options.partition else {})}
    return Jobs(folder / "jobs", options.cluster, asked | slurm)


def _tell(summary: dict[str, Any], study: "Study", folder: Path) -> int:
    """Say how the trials ended, and which is the best; 1 where none has finished."""
    from lit_methods.sweeps.study import best_trial

    states = [trial["state"] for trial in summary["trials"]]
    print(
        f"\n{len(states)} trial{'' if len(states) == 1 else 's'}: "
        + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    )
    best = best_trial(summary)
    if best is not None:
        print(f"best: trial {best['number']}, {summary['metric']} {best['value']:.5g}, {folder / best['run']}")
        print(f"  lit {shlex.join(study.sweep.trial_words(best['values']))}")
    print(f"table and plot: lit report {folder}")
    return int(best is None)
