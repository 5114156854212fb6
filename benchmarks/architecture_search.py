"""What searched sparse networks cost.

    python benchmarks/architecture_search.py [--section dass] [--rounds 5] [--channels 8] [--cells 4] [--batch 16] [--json FILE]

``dass``: the five evaluations of a second-order step of DASS's search (four for the gradient of alpha, one for the weights) on random
images of 3 x 16 x 16, by functional calls, as ``DASSSearch`` makes them, and by the plain way: a copy of the model for the unrolled step,
and finite differences that move the model's own weights and put them back. The script fails if the two gradients of alpha differ. Seconds
are processor time of this process, medians over rounds in which both run, the first of them in turns; megabytes are what a process of its
own grows by at most while it makes three steps.

Use an idle machine.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lit_methods import SearchNetwork
from lit_methods.architecture_search.layers import scored_layers
from lit_methods.functional import architecture_gradient

RATE, DECAY, RADIUS = 0.025, 1e-3, 0.01
Batch = tuple[Tensor, Tensor]
Step = Callable[[SearchNetwork, Batch, Batch], list[Tensor]]


def weights_of(network: SearchNetwork) -> dict[str, nn.Parameter]:
    """What the weights' optimiser trains outside of the pruning phase."""
    return {name: p for name, p in network.named_parameters() if name not in network.alphas() and not name.endswith("scores")}


def weights_step(network: SearchNetwork, train: Batch) -> None:
    """The fifth evaluation."""
    loss = F.cross_entropy(network(train[0]), train[1])
    torch.autograd.grad(loss, list(weights_of(network).values()))


def functional_way(network: SearchNetwork, train: Batch, val: Batch) -> list[Tensor]:
    """All five evaluations by functional calls; the gradient of alpha."""

    def loss_of(batch: Batch) -> Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]:
        def loss(alphas: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
            means = {name: value.clone() for name, value in network.named_buffers() if not name.endswith("mask")}
            return F.cross_entropy(functional_call(network, means | alphas | weights, (batch[0],)), batch[1])

        return loss

    options = {"rate": RATE, "weight_decay": DECAY, "radius": RADIUS}
    found = architecture_gradient(loss_of(train), loss_of(val), dict(network.alphas()), dict(weights_of(network)), **options)
    weights_step(network, train)
    return list(found.gradient.values())


def copying_way(network: SearchNetwork, train: Batch, val: Batch) -> list[Tensor]:
    """All five evaluations by a copy of the model and by weights that are moved in place; the gradient of alpha."""
    weights, alphas = list(weights_of(network).values()), list(network.alphas().values())
    inner = torch.autograd.grad(F.cross_entropy(network(train[0]), train[1]), weights)
    unrolled = copy.deepcopy(network)
    moved = list(weights_of(unrolled).values())
    with torch.no_grad():
        for weight, gradient in zip(moved, inner, strict=True):
            weight.sub_(RATE * (gradient + DECAY * weight))
    loss = F.cross_entropy(unrolled(val[0]), val[1])
    both = torch.autograd.grad(loss, [*unrolled.alphas().values(), *moved])
    outer, slope = both[: len(alphas)], both[len(alphas) :]
    step = RADIUS / torch.nn.utils.get_total_norm(list(slope))
    sides = []
    for back in (1.0, -2.0):
        with torch.no_grad():
            for weight, gradient in zip(weights, slope, strict=True):
                weight.add_(gradient, alpha=float(back * step))
        sides.append(torch.autograd.grad(F.cross_entropy(network(train[0]), train[1]), alphas))
    with torch.no_grad():
        for weight, gradient in zip(weights, slope, strict=True):
            weight.add_(gradient, alpha=float(step))
    weights_step(network, train)
    return [first - RATE * (plus - minus) / (2 * step) for first, plus, minus in zip(outer, *sides, strict=True)]


WAYS: dict[str, Step] = {"functional calls": functional_way, "copy of the model": copying_way}


def growth(step: Step, make: Callable[[], tuple[SearchNetwork, Batch, Batch]]) -> float:
    """Megabytes that a forked process grows by at most while it makes three steps."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        parts = make()
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        for _ in range(3):
            step(*parts)
        os.write(write, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(read, 100))


def dass(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of the five evaluations."""

    def make() -> tuple[SearchNetwork, Batch, Batch]:
        torch.manual_seed(0)
        network = SearchNetwork(args.channels, args.cells)
        for layer in scored_layers(network).values():
            layer.set_keep(0.1, rescore=True)
        train, val = ((torch.randn(args.batch, 3, 16, 16), torch.randint(10, (args.batch,))) for _ in range(2))
        return network, train, val

    found: dict[str, Any] = {f"MB, {name}": growth(step, make) for name, step in WAYS.items()}
    parts = make()
    first, second = (step(*parts) for step in WAYS.values())
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(first, second, strict=True))
    assert error < 1e-2, f"the two ways differ by {error:.2g} of the largest entry"
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(args.rounds):
        for name in list(WAYS)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            WAYS[name](*parts)
            seconds[name].append(time.process_time() - start)
    found |= {f"seconds, {name}": statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return found | {"ratio of seconds": statistics.median(ratios), "largest relative difference of the gradients": error}


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"dass": dass}


def main() -> None:
    """Run the sections and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=[*SECTIONS], help="one of them; without it all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {name: section(args) for name, section in SECTIONS.items() if args.section in (None, name)}
    for name, figures in found.items():
        print(name)
        for what, value in figures.items():
            print(f"  {what:50s} {value:.4g}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
