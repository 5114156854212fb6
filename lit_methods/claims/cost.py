"""What a technique adds to its baseline per training step: both arms in turn, one at a time, nothing else beside them."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lit_methods.claims.plan import Node, Plan, digest
from lit_methods.claims.runner import Runner
from lit_methods.claims.study import Cost, Study

ROUNDS = 3


def timed_study(study: Study) -> Study:
    """The study cut down to what is timed: chains that end with a timed stage, nothing to judge."""
    cost = study.cost
    if cost is None:
        raise ValueError(f"{study.slug} declares no cost")
    chains = {name: (cost.own[name],) if name in cost.own else study.arms[name][: cost.stage + 1] for name in cost.arms}
    return dataclasses.replace(study, arms=chains, reports=(), tuned={}, differences={})


def cost_nodes(cost: Cost, plan: Plan, seed: int, steps: int, rounds: int = ROUNDS) -> list[tuple[str, Node]]:
    """The timed runs in turn (A B A B A B) as (arm, stage). Each is a stage of its own, so that equal ones are run every time."""
    runs = []
    for number in range(rounds):
        for arm in cost.arms:
            node = plan.chains[arm][seed][0 if arm in cost.own else cost.stage]
            limits = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": "false"}
            words = list(node.words)
            place = words.index("--trainer.callbacks+=StepCost") + 1
            words[place:place] = ["--trainer.callbacks.synchronize", "true"]
            words += [word for key, value in limits.items() for word in (f"--trainer.{key}", str(value))]
            key = digest([node.key, arm, limits, number])
            name = f"cost-{node.name.rpartition('-')[0]}-{number}-{key}"
            runs.append((arm, Node(key, name, words, seed, node.upstream, [f"cost of {arm}"], kind=f"cost {arm}")))
    return runs


def measure(runner: Runner, runs: Sequence[tuple[str, Node]]) -> dict[str, list[dict[str, Any]]]:
    """Run stages one after the other, and what they need; returns arm -> what ``StepCost`` wrote in each round."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for number, (arm, node) in enumerate(runs, start=1):
        done = runner.run([*_upstream(node), node])
        rounds.setdefault(arm, []).append(done[node.key]["cost"])
        print(f"[{number}/{len(runs)}] cost of {arm}: {len(done[node.key]['cost']['seconds'])} steps timed", flush=True)
    return rounds


def _upstream(node: Node) -> list[Node]:
    return [] if node.upstream is None else [*_upstream(node.upstream), node.upstream]


def compare_cost(method: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the method adds per step.

    Both saw the same batches, so step i of the one is compared with step i of the other in the same round.

    Args:
        method: What ``StepCost`` wrote for the method, a dict a round.
        baseline: The same for the baseline.

    Returns:
        ``seconds`` and ``baseline_seconds`` (medians of all steps), ``added_seconds`` (median of the paired differences), ``ratio`` with
        ``ratio_quartiles`` (of the paired ratios), ``mib``, ``baseline_mib``, ``added_mib`` (medians over rounds), ``memory``,
        ``parameters``, ``baseline_parameters``, ``data_seconds``, ``pairs`` (number of paired steps), ``device``.

    Raises:
        ValueError: No step was timed.
    """
    pairs = [pair for one, other in zip(method, baseline, strict=True) for pair in zip(one["seconds"], other["seconds"], strict=False)]
    if not pairs:
        raise ValueError("no step was timed in both arms: raise cost.steps, or train on more batches than the two of the warm-up")
    ratios = [one / other for one, other in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "seconds": statistics.median(one for one, _ in pairs),
        "baseline_seconds": statistics.median(other for _, other in pairs),
        "added_seconds": statistics.median(one - other for one, other in pairs),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "data_seconds": statistics.median(value for one in method for value in one["data_seconds"]),
        "mib": statistics.median(one["peak_mib"] for one in method),
        "baseline_mib": statistics.median(one["peak_mib"] for one in baseline),
        "added_mib": statistics.median(one["peak_mib"] - other["peak_mib"] for one, other in zip(method, baseline, strict=True)),
        "memory": method[0]["memory"],
        "parameters": method[0]["parameters"],
        "baseline_parameters": baseline[0]["parameters"],
        "pairs": len(pairs),
        "device": method[0]["device"],
    }
