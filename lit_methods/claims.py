"""Re-show a claim of a paper: arms of ordinary ``lit`` runs over several seeds, paired difference, verdict.

``python -m lit_methods.claims superflow`` reads ``configs/claims/superflow.yaml``. Every stage of every arm is a
``lit`` command in a process of its own; finished stages are kept under a key of command, config and code version, so
an interrupted claim goes on where it stopped, and arms share the stages that they begin with.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_methods.catalog import configs_folder, package_folder


@dataclass(frozen=True)
class Verdict:
    """Paired comparison of two arms.

    Attributes:
        mean: Mean difference, method - baseline, in the metric's unit.
        low: Lower end of the 95 % t-interval of the mean.
        high: Upper end.
        better: Seeds in which the method is better.
        verdict: ``holds``, ``does not hold`` or ``undecided``.
    """

    mean: float
    low: float
    high: float
    better: int
    verdict: str


def judge(method: list[float], baseline: list[float], higher: bool = True, gate: float = 0.0) -> Verdict:
    """Decide a claim from paired values, one pair a seed.

    Args:
        method: Values of the method.
        baseline: Values of the baseline, same seeds.
        higher: Whether larger is better.
        gate: The advantage must be at least this in every seed.

    Returns:
        ``holds`` if the interval lies on the better side of zero and the gate is met; ``does not hold`` if it lies on
        the other side, or the advantage misses the gate although it is certain; else ``undecided``.

    Raises:
        ValueError: Fewer than three pairs.
    """
    from scipy import stats

    if len(method) != len(baseline) or len(method) < 3:
        raise ValueError(f"a verdict needs at least 3 seeds of both arms, got {len(method)} and {len(baseline)}")
    gains = [(a - b) * (1 if higher else -1) for a, b in zip(method, baseline, strict=True)]
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.fmean(gains)
    if mean - half > 0:
        verdict = "holds" if min(gains) >= gate else "does not hold"
    else:
        verdict = "does not hold" if mean + half < 0 else "undecided"
    sign = 1 if higher else -1
    low, high = sorted((sign * (mean - half), sign * (mean + half)))
    return Verdict(sign * mean, low, high, sum(gain > 0 for gain in gains), verdict)


def code_version() -> str:
    """Hash of the package's sources and configs."""
    digest = hashlib.sha256()
    for package in ("lit_methods", "lit_methods.callbacks", "lit_methods.datamodules"):
        for source in sorted(package_folder(package).rglob("*.py")):
            digest.update(source.read_bytes())
    for config in sorted(configs_folder().glob("*.yaml")):
        digest.update(config.read_bytes())
    return digest.hexdigest()[:16]


def stage_words(stage: dict[str, Any], seed: int, seed_keys: list[str], checkpoint: str) -> list[str]:
    """Arguments of ``lit`` for one stage."""

    def fill(value: Any) -> str:
        text = json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)
        return text.replace("{checkpoint}", checkpoint)

    words = [stage["command"], "--config", f"configs/{stage['config']}"]
    words += [word for key in seed_keys for word in (f"--{key}", str(seed))]
    words += [word for key, value in stage.get("set", {}).items() for word in (f"--{key}", fill(value))]
    words += [f"--trainer.callbacks+={name}" for name in stage.get("callbacks", [])]
    return words + (["--ckpt_path", fill(stage["checkpoint"])] if "checkpoint" in stage else [])


class Runner:
    """Runs stages, each once.

    Args:
        root: Folder of the runs and their results.
        threads: Torch threads of one run.
        extra: Further arguments of every stage.
    """

    def __init__(self, root: Path, threads: int, extra: list[str]) -> None:
        self.root, self.threads, self.extra, self.version = root, threads, extra, code_version()

    def run(self, stages: list[dict[str, Any]], seed: int, seed_keys: list[str]) -> dict[str, Any]:
        """Run a chain of stages for one seed; the result of the last one.

        Returns:
            ``metrics`` (last value of each), ``seconds`` of this stage, ``checkpoint`` and ``folder``.
        """
        result: dict[str, Any] = {"checkpoint": ""}
        chain = self.version
        for stage in stages:
            words = stage_words(stage, seed, seed_keys, result["checkpoint"]) + self.extra
            chain = hashlib.sha256(f"{chain} {json.dumps([stage, seed, self.extra], sort_keys=True)}".encode()).hexdigest()[:16]
            folder = self.root / chain
            done = folder / "result.json"
            if not done.is_file():
                result = self._run(words, folder, result["checkpoint"])
                done.write_text(json.dumps(result, indent=1), encoding="utf-8")
            result = json.loads(done.read_text(encoding="utf-8"))
        return result

    def _run(self, words: list[str], folder: Path, before: str) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lit_methods", *words, "--run_root", str(folder), "--name", "run"]
        start = time.monotonic()
        with (folder / "output.txt").open("w", encoding="utf-8") as output:
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        if status:
            tail = (folder / "output.txt").read_text(encoding="utf-8").splitlines()[-15:]
            raise RuntimeError("\n".join([f"stage failed with status {status}: lit {' '.join(words)}", *tail]))
        run = max((folder / "run").iterdir())
        metrics: dict[str, float] = {}
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            metrics.update(json.loads(line)["metrics"])
        last = run / "checkpoints" / "last.ckpt"
        checkpoint = str(last) if last.is_file() else before
        return {"metrics": metrics, "seconds": round(time.monotonic() - start, 1), "checkpoint": checkpoint, "folder": str(run)}


def table(claim: dict[str, Any], values: dict[str, list[float]], reports: dict[str, list[float]]) -> str:
    """Markdown: one row an arm and one a report, with every seed, mean and standard deviation."""
    seeds = claim["seeds"]
    lines = [f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | std |", "|---|" + "---|" * (len(seeds) + 2)]
    for name, row in {**values, **reports}.items():
        spread = statistics.stdev(row) if len(row) > 1 else 0.0
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} | {statistics.fmean(row):.3f} | {spread:.3f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one claim and print its table and verdict."""
    parser = argparse.ArgumentParser(prog="python -m lit_methods.claims", description=__doc__.splitlines()[0])
    parser.add_argument("slug", help="technique, such as superflow")
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time; the cores are shared among them")
    parser.add_argument("--root", type=Path, default=Path("runs/claims"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further arguments of every stage, for a quick look")
    options = parser.parse_args(argv)
    file = configs_folder() / "claims" / f"{options.slug}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        print(f"error: no claim for {options.slug!r}; there are: {known}", file=sys.stderr)
        return 2
    claim = yaml.safe_load(file.read_text(encoding="utf-8"))
    runner = Runner(options.root / options.slug, max(1, (os.cpu_count() or 1) // options.jobs), options.extra)
    chains = {arm: stages for arm, stages in claim["arms"].items()}
    for report in claim.get("reports", []):
        chains[f"report: {report['name']}"] = [*claim["arms"][report["arm"]], report["stage"]]

    def one_seed(seed: int) -> dict[str, dict[str, Any]]:
        found = {}
        for name, stages in chains.items():
            found[name] = runner.run(stages, seed, claim["seed_keys"])
            print(f"seed {seed}, {name}: {found[name]['seconds']} s", flush=True)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(one_seed, claim["seeds"]))
    values = {arm: [result[arm]["metrics"][claim["metric"]] for result in results] for arm in claim["arms"]}
    reports = {
        report["name"]: [result[f"report: {report['name']}"]["metrics"][report["metric"]] for result in results]
        for report in claim.get("reports", [])
    }
    verdict = judge(values[claim["method"]], values[claim["baseline"]], claim["direction"] == "higher", claim.get("gate", 0.0))
    print(f"\n{claim['claim']}\nmetric: {claim['metric']}\n\n{table(claim, values, reports)}\n")
    print(
        f"{claim['method']} - {claim['baseline']}: {verdict.mean:+.3f}, 95 % t-interval [{verdict.low:+.3f}, {verdict.high:+.3f}], "
        f"better in {verdict.better} of {len(results)} seeds, gate {claim.get('gate', 0.0)}: {verdict.verdict}"
    )
    summary = {"claim": claim["claim"], "values": values, "reports": reports, "verdict": vars(verdict), "code": runner.version}
    (runner.root / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
