"""The study of a sweep: optuna draws values and judges early, in a journal that outlives the process; trials are told from run folders."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_methods.errors import CommandError
from lit_methods.sweeps.definition import Parameter, Sweep, missing_trials

if TYPE_CHECKING:
    import optuna

JOURNAL, SUMMARY = "study.journal", "sweep.json"


class Study:
    """Trials of one sweep, kept in ``study.journal`` of its folder.

    Args:
        sweep: What is searched.
        folder: The sweep's folder; it must be there.
        jobs: Trials at a time: a bayesian search then doesn't draw what others are at.

    Raises:
        ImportError: optuna is missing; the message names the extra.
        CommandError: The folder holds another sweep.
    """

    def __init__(self, sweep: Sweep, folder: Path, jobs: int = 1) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise CommandError('lit sweep draws with optuna: pip install "lit-methods[tuning]"', exit_code=1) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.folder = sweep, folder
        self._optuna = optuna
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        self._study = optuna.create_study(storage=storage, study_name="sweep", direction=sweep.goal, load_if_exists=True)
        told = self._study.user_attrs.get("sweep")
        if told is None:
            self._study.set_user_attr("sweep", sweep.described())
        elif told != sweep.described():
            other = [key for key, value in sweep.described().items() if told.get(key) != value]
            raise CommandError(f"{folder} holds another sweep, its {' and '.join(other)} differ: give another --root, or another name")
        number = len(self._study.trials)  # a study that goes on must not draw the same values again
        self._study.sampler = (
            optuna.samplers.TPESampler(seed=number, constant_liar=jobs > 1)
            if sweep.method == "bayes"
            else optuna.samplers.RandomSampler(seed=number)
        )
        if sweep.early is not None:
            self._study.pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=sweep.early.first, reduction_factor=sweep.early.eta, min_early_stopping_rate=0
            )

    @property
    def trials(self) -> "list[optuna.trial.FrozenTrial]":
        """All trials that have been begun, in order."""
        waiting = self._optuna.trial.TrialState.WAITING
        return [trial for trial in self._study.trials if trial.state != waiting]

    def unfinished(self) -> "list[optuna.Trial]":
        """Trials that a process that is gone left behind."""
        running = self._optuna.trial.TrialState.RUNNING
        return [self._optuna.Trial(self._study, trial._trial_id) for trial in self._study.trials if trial.state == running]

    def again(self) -> int:
        """Let failed trials be run again, each once; how many."""
        repeated = set(self._study.user_attrs.get("again", ()))
        failed = [trial for trial in self.trials if trial.state.name == "FAIL" and trial.number not in repeated]
        for trial in failed:
            self._study.enqueue_trial(trial.params)
        self._study.set_user_attr("again", sorted(repeated | {trial.number for trial in failed}))
        return len(failed)

    def left(self, total: int | None) -> int:
        """Trials that are still to be begun, at most ``total`` in all; for a grid without ``total`` all that are missing."""
        repeated = set(self._study.user_attrs.get("again", ()))
        begun = sum(trial.number not in repeated for trial in self.trials)
        whole = math.inf if total is None else total - begun
        if self.sweep.method == "grid":
            whole = min(whole, len(self._missing()) + len(self._study.trials) - len(self.trials))
        return max(0, int(whole))

    def _missing(self) -> list[dict[str, Any]]:
        """Combinations of the grid that no trial has, begun or waiting."""
        return missing_trials(self.sweep, [self.values_of(trial) for trial in self._study.trials])

    def ask(self) -> "optuna.Trial":
        """The next trial, with its values."""
        if self.sweep.method == "grid" and len(self.trials) == len(self._study.trials):  # none waits to be run again
            self._study.enqueue_trial({key: json.dumps(value) for key, value in self._missing()[0].items()})
        trial = self._study.ask()
        for parameter in self.sweep.parameters:
            _suggest(trial, parameter, self.sweep.method == "grid")
        return trial

    def values_of(self, trial: "optuna.Trial | optuna.trial.FrozenTrial") -> dict[str, Any]:
        """Key -> value of a trial."""
        params = trial.params or getattr(trial, "system_attrs", {}).get("fixed_params") or {}
        return {key: json.loads(value) if isinstance(value, str) else value for key, value in params.items()}

    def watch(self, trial: "optuna.Trial", values: Sequence[float]) -> bool:
        """Tell what a trial has logged so far; whether it should stop."""
        if self.sweep.early is None:
            return False
        known = len(self._study._storage.get_trial(trial._trial_id).intermediate_values)
        for place, value in list(enumerate(values, 1))[known:]:
            trial.report(value, place)
            if trial.should_prune():
                return True
        return False

    def finish(self, trial: "optuna.Trial", state: str, value: float | None, why: str, facts: Mapping[str, Any]) -> None:
        """Keep how a trial ended: ``finished``, ``stopped early`` or ``failed``."""
        for name, fact in {**facts, **({"why": why} if why else {})}.items():
            trial.set_user_attr(name, fact)
        states = self._optuna.trial.TrialState
        kept = {"finished": states.COMPLETE, "stopped early": states.PRUNED, "failed": states.FAIL}[state]
        if kept == states.PRUNED and value is not None:
            trial.set_user_attr("value", value)
        self._study.tell(trial, value if kept == states.COMPLETE else None, kept)

    def summary(self) -> dict[str, Any]:
        """The sweep and its trials as plain values, as ``sweep.json`` holds them."""
        words = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "running"}
        rows: list[dict[str, Any]] = []
        for trial in self.trials:
            value = trial.value if trial.state.name == "COMPLETE" else trial.user_attrs.get("value")
            rows.append(
                {
                    "number": trial.number,
                    "state": words[trial.state.name],
                    "value": value if value is not None and math.isfinite(value) else None,
                    "values": self.values_of(trial),
                    **{name: trial.user_attrs[name] for name in ("run", "seconds", "logged", "why") if name in trial.user_attrs},
                }
            )
        sweep = self.sweep
        return {
            "name": sweep.name,
            "method": sweep.method,
            "metric": sweep.metric,
            "goal": sweep.goal,
            "words": list(sweep.words),
            "parameters": [parameter.key for parameter in sweep.parameters],
            "logarithmic": [parameter.key for parameter in sweep.parameters if parameter.distribution.startswith("log")],
            "trials": rows,
        }


def _suggest(trial: "optuna.Trial", parameter: Parameter, grid: bool) -> None:
    if grid or not parameter.is_range:  # values of any kind, which optuna's journal wouldn't keep
        trial.suggest_categorical(parameter.key, [json.dumps(value) for value in parameter.steps])
    elif parameter.distribution == "int_uniform":
        trial.suggest_int(parameter.key, round(parameter.low), round(parameter.high))
    else:
        high = parameter.high
        if parameter.step is not None:
            high = parameter.low + math.floor((high - parameter.low) / parameter.step + 1e-9) * parameter.step
        trial.suggest_float(parameter.key, parameter.low, high, step=parameter.step, log=parameter.distribution.startswith("log"))


def best_trial(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The finished trial with the best value; None where there is none."""
    finished = [trial for trial in summary["trials"] if trial["state"] == "finished" and trial["value"] is not None]
    sign = 1 if summary["goal"] == "minimize" else -1
    return min(finished, key=lambda trial: sign * trial["value"], default=None)
