"""What sparse training costs: steps with and without masks in turns, and each mask function beside the way one would write it at first.

    python benchmarks/sparsity.py [--rounds 9] [--steps 6] [--threads 1] [--json FILE]

1. A training step of a ResNet-18 (batch 64, 64 x 64 pixels) and of a small ViT (batch 32, 32 x 32) with each callback, beside the same fit
   without it; with the two callbacks that have a target also a ResNet-18 at batch 16: masks cost the same whatever the batch, the rest of
   the step doesn't. A round fits both sides, the first of them in turns, and takes the median step; the ratio is with / without of one
   round, its median and quartiles are printed. Targets, but for batch 16: a static mask at most 1.05, N:M with a decaying gradient at most
   1.25. CAST runs a teacher, too, and beside Adam; Sparse-IFT trains a larger network: masked products cost what dense ones do, whatever
   their FLOPs in theory.
2. ``nm_mask`` at 2:4, 4:8, 4:16, 1:16 and 1:32 on a 1024 x 4096 weight beside sorting each group (the masks must be equal), and beside
   ``torch.topk``, which is right only without ties.
3. One mask update of RigL on a 4-million-weight layer beside sorting the whole layer; ``keep_largest`` beside counting ties always; the
   batch-norm penalty of MaskSparsity beside its formula; AdamS in small pieces beside whole tensors; an evaluation with N:M weights beside
   masks that are made anew at each pass.
   A training step with ``NMSparsity`` beside a loop of torch alone with the same masks and gradients (target: at most 1.10).
4. Memory of masks: bytes per weight.
5. Inference of a ResNet-18 (batch 8, 128 x 128) with half of its channels removed for good, beside the dense one.

Use an idle machine. Both sides run in this process with ``--threads`` torch threads.
"""

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from lit_methods.callbacks import CAST, DSL, DynamicSparsity, IterativeSoftShrinkage, MaskedBNSparsity, NMSparsity, SparseIFT
from lit_methods.callbacks.sparsity.cast import adams
from lit_methods.callbacks.sparsity.channels import prune_channels
from lit_methods.callbacks.sparsity.drop_grow import update_mask
from lit_methods.callbacks.sparsity.masks import keep_largest, nm_mask
from lit_methods.callbacks.sparsity.masksparsity.core import sparse_gradient
from lit_methods.callbacks.sparsity.parametrized import ParametrizedWeight
from lit_methods.callbacks.sparsity.progressive_gradient_flow.callback import MaskedForward, _Flow
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import Phase
from lit_methods.callbacks.sparsity.store import prunable_weights

WARM_UP = 2
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.001),
}
CALLBACKS: dict[str, tuple[Callable[[], pl.Callback], str]] = {
    "static": (lambda: DynamicSparsity(0.1, "static"), "sgd"),
    "rigl, update every 100 steps": (lambda: DynamicSparsity(0.1, "rigl", interval=100, end_fraction=1.0), "sgd"),
    "rigl, update every step": (lambda: DynamicSparsity(0.1, "rigl", interval=1, end_fraction=1.0), "sgd"),
    "DSL, update every 100 steps": (lambda: DSL(0.1, interval=100), "sgd"),
    "2:4, decaying gradient": (lambda: NMSparsity(2, 4), "sgd"),
    "ISS-P": (lambda: IterativeSoftShrinkage(0.9, prune_iters=10_000), "sgd"),
    "CAST 2:4, no teacher": (lambda: CAST(2, 4, distill_weight=0.0, probe_interval=0), "adam"),
    "CAST 2:4": (lambda: CAST(2, 4, distill="network", probe_interval=0), "adam"),
    "MaskSparsity": (lambda: MaskedBNSparsity("global_sparsity", forward="network"), "sgd"),
    "Sparse-IFT wide 0.5": (lambda: SparseIFT(0.5, "wide", flops_tolerance=None), "sgd"),
}
TARGETS = {"static": 1.05, "2:4, decaying gradient": 1.25}
SMALL_BATCH = "ResNet-18, batch 16"
CONVOLUTIONAL = ("MaskSparsity", "Sparse-IFT wide 0.5")  # there is nothing for them in a ViT


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Classifier(pl.LightningModule):
    """Any network on random images."""

    def __init__(self, network: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, or Adam."""
        return OPTIMIZERS[self.optimizer](self.parameters())


class Clock(pl.Callback):
    """Seconds from the end of one batch to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Of the steps after the warm-up."""
        return statistics.median(b - a for a, b in zip(self.ends[WARM_UP:], self.ends[WARM_UP + 1 :], strict=False))


def fit(network: Callable[[], nn.Module], size: int, batch: int, steps: int, callbacks: list[pl.Callback], optimizer: str = "sgd") -> float:
    """Median seconds per step of one fit."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    batches: Any = [[images, labels]] * (steps + WARM_UP + 1)
    loader = DataLoader(batches, batch_size=None)
    clock = Clock()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[*callbacks, clock], **silent)  # type: ignore[arg-type]
    trainer.fit(Classifier(network(), optimizer), train_dataloaders=loader)
    return clock.median()


def vit() -> nn.Module:
    """A small vision transformer."""
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10)
    return network


def bench_steps(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Ratio of a step with masks to one without, per network and method."""
    networks: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
        "ResNet-18": (lambda: resnet18(num_classes=10), 64, 64),
        SMALL_BATCH: (lambda: resnet18(num_classes=10), 64, 16),
        "ViT, 6 x 192": (vit, 32, 32),
    }
    rows = []
    for name, (network, size, batch) in networks.items():
        for label, (make, optimizer) in CALLBACKS.items():
            if (name.startswith("ViT") and label in CONVOLUTIONAL) or (name == SMALL_BATCH and label not in TARGETS):
                continue
            ratios, plain = [], []
            for turn in range(rounds):
                sides = {}
                for side in ("with", "without") if turn % 2 else ("without", "with"):
                    sides[side] = fit(network, size, batch, steps, [make()] if side == "with" else [], optimizer)
                ratios.append(sides["with"] / sides["without"])
                plain.append(sides["without"])
            rows.append({"network": name, "masks": label, "ratio": quartiles(ratios), "plain_ms": 1e3 * statistics.median(plain)})
    return rows


def bench_channels(rounds: int) -> dict[str, Any]:
    """Seconds of a forward pass, dense and with half of the channels removed."""
    torch.manual_seed(0)
    dense, images = resnet18(num_classes=10).eval(), torch.randn(8, 3, 128, 128)
    small = copy.deepcopy(dense)
    norms = {name: norm for name, norm in small.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    keep = {name: torch.arange(norm.num_features) % 2 == 0 for name, norm in norms.items()}
    prune_channels(small, keep, images[:1])
    parameters = [sum(parameter.numel() for parameter in network.parameters()) for network in (dense, small)]
    with torch.inference_mode():
        seconds = in_turns({"ours": lambda: small(images), "dense": lambda: dense(images)}, rounds)
    return {"parameters": parameters, **compared(seconds)}


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, one call of each per round, the order reversed every other round."""
    for call in sides.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 else reversed(list(sides)):
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def nm_by_sorting(weight: Tensor, n: int, m: int) -> Tensor:
    """Each group sorted, the first n places of the order switched on: right also with ties."""
    groups = weight.abs().unflatten(1, (-1, m))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True).flatten(1)


def nm_by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    """``torch.topk`` in each group: which of two equal weights stays is left open."""
    groups = weight.abs().unflatten(1, (-1, m))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, dim=-1).indices, True).flatten(1)


def update_by_sorting(weight: Tensor, mask: Tensor, score: Tensor, fraction: float, target: int) -> Tensor:
    """RigL's update with two sorts of the whole layer."""
    active = int(mask.sum())
    magnitude = weight.abs().masked_fill(~mask, -1.0).flatten()
    kept = torch.zeros_like(mask).flatten()
    kept[magnitude.argsort(descending=True, stable=True)[: active - int(fraction * active)]] = True
    rest = score.flatten().masked_fill(kept, -1.0)
    kept[rest.argsort(descending=True, stable=True)[: target - int(kept.sum())]] = True
    return kept.view_as(mask)


def bench_masks(rounds: int) -> list[dict[str, Any]]:
    """Mask functions beside plain formulations."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 4096, generator=generator)
    rows = []
    for n, m in ((2, 4), (4, 8), (4, 16), (1, 16), (1, 32)):
        assert torch.equal(nm_mask(weight, n, m), nm_by_sorting(weight, n, m)), f"{n}:{m} masks differ"
        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda n=n, m=m: nm_mask(weight, n, m),  # type: ignore[misc]
            "sorting": lambda n=n, m=m: nm_by_sorting(weight, n, m),  # type: ignore[misc]
            "topk": lambda n=n, m=m: nm_by_topk(weight, n, m),  # type: ignore[misc]
        }
        rows.append({"what": f"nm_mask {n}:{m}, 1024 x 4096", **compared(in_turns(sides, rounds))})
    mask = keep_largest(torch.rand(weight.shape, generator=generator), weight.numel() // 10)
    sparse, score, target = weight * mask, torch.rand(weight.shape, generator=generator), int(mask.sum())
    assert torch.equal(update_mask(sparse, mask, score, 0.3, target), update_by_sorting(sparse, mask, score, 0.3, target)), "updates differ"
    sides = {
        "ours": lambda: update_mask(sparse, mask, score, 0.3, target),
        "sorting": lambda: update_by_sorting(sparse, mask, score, 0.3, target),
    }
    rows.append({"what": "RigL update, 1024 x 4096 at 10 %", **compared(in_turns(sides, rounds))})
    count = weight.numel() // 10
    assert torch.equal(keep_largest(score, count), largest_by_counting(score, count)), "masks differ"
    sides = {"ours": lambda: keep_largest(score, count), "counting ties": lambda: largest_by_counting(score, count)}
    rows.append({"what": "keep_largest, 1024 x 4096", **compared(in_turns(sides, rounds))})
    gamma, grad, prune = torch.randn(512, generator=generator), torch.randn(512, generator=generator), torch.arange(512) % 2 == 0
    factor = prune.float()
    assert torch.equal(sparse_gradient(gamma, grad, prune, "l1", 5e-4), grad + 5e-4 * gamma.sign() * factor), "gradients differ"
    sides = {
        "ours": lambda: [sparse_gradient(gamma, grad, prune, "l1", 5e-4) for _ in range(100)],
        "formula": lambda: [grad + 5e-4 * gamma.sign() * factor for _ in range(100)],
    }
    rows.append({"what": "100 batch-norm penalties, 512", **compared(in_turns(sides, rounds))})
    sides = {"ours": adams_step({"cpu": 2**16}), "whole tensors": adams_step({})}
    rows.append({"what": "AdamS, 12 x 512 x 512, 4096 x 1024", **compared(in_turns(sides, rounds))})
    sides = {"ours": evaluation(keep=True), "masks made anew": evaluation(keep=False)}
    rows.append({"what": "evaluation, 8 layers 1024 x 1024 at 2:4", **compared(in_turns(sides, rounds))})
    return rows


def largest_by_counting(score: Tensor, count: int) -> Tensor:
    """The largest scores, with the entries at the threshold counted off whether there are ties or not."""
    flat = score.flatten()
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    above, level = flat > threshold, flat == threshold
    return (above | (level & (level.cumsum(0) <= count - above.sum()))).view_as(score)


def adams_step(at_once: dict[str, int]) -> Callable[[], Any]:
    """A step of AdamS in pieces of a size."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(512, 512)] * 12 + [(4096, 1024)]]
    optimizer = adams.AdamS(weights, total_steps=1000, sparse=weights)
    optimizer.set_masks({weight: nm_mask(weight, 2, 4) for weight in weights})
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)

    def step() -> None:
        before, adams._AT_ONCE = adams._AT_ONCE, at_once
        optimizer.step()
        adams._AT_ONCE = before

    return step


def evaluation(keep: bool) -> Callable[[], Any]:
    """A forward pass in evaluation through linear layers with N:M weights, at batch 64."""
    torch.manual_seed(0)
    network, flow = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))), _Flow(2, 4, 0.0, "ste")
    flow.set(Phase("sparse", 0.0, 2, 4))
    for layer in network:
        ParametrizedWeight(layer, "weight", MaskedForward(flow, 1)).attach()
    network.eval()
    inputs = torch.randn(64, 1024)

    def run() -> None:
        with torch.no_grad():
            if not keep:
                for layer in network:
                    layer.parametrizations["weight"][0]._last = None  # type: ignore[index, union-attr, assignment]
            network(inputs)

    return run


class _ByHand(torch.autograd.Function):
    """W * M forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # type: ignore[override]
        return weight * nm_mask(weight, 2, 4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def by_hand(steps: int) -> float:
    """Median seconds per step of a plain loop that trains the small ViT with 2:4 weights in its inner linear layers."""
    torch.manual_seed(0)
    network = vit()
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    inner = [name.rpartition(".")[0] for name in prunable_weights(network)][1:-1]
    for name in inner:
        layer: Any = network.get_submodule(name)
        layer.forward = lambda x, layer=layer: nn.functional.linear(x, _ByHand.apply(layer.weight), layer.bias)
    optimizer, seconds = OPTIMIZERS["sgd"](network.parameters()), []
    for _ in range(steps + WARM_UP + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def bench_by_hand(rounds: int, steps: int) -> tuple[float, float, float]:
    """Ratio of a step with ``NMSparsity`` to one of the loop by hand."""
    ratios = []
    for turn in range(rounds):
        sides = {}
        for side in ("ours", "by hand") if turn % 2 else ("by hand", "ours"):
            sides[side] = fit(vit, 32, 32, steps, [NMSparsity(2, 4, "ste")]) if side == "ours" else by_hand(steps)
        ratios.append(sides["ours"] / sides["by hand"])
    return quartiles(ratios)


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds of ours, and how many times longer the others took: median and quartiles over the rounds."""
    ratios = {
        name: quartiles([other / ours for other, ours in zip(values, seconds["ours"], strict=True)])
        for name, values in seconds.items()
        if name != "ours"
    }
    return {"ours_ms": 1e3 * statistics.median(seconds["ours"]), "others_longer": ratios}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each figure (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed training steps of a fit (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds}
    found["masks"] = bench_masks(options.rounds)
    for row in found["masks"]:
        others = ", ".join(f"{name} {r[1]:.2f} x as long ({r[0]:.2f} to {r[2]:.2f})" for name, r in row["others_longer"].items())
        print(f"{row['what']:40} {row['ours_ms']:8.1f} ms; {others}", flush=True)
    low, middle, high = found["by_hand"] = bench_by_hand(options.rounds, options.steps)
    print(f"ViT at 2:4: step / step of a loop by hand {middle:.3f} ({low:.3f} to {high:.3f}), target 1.10", flush=True)
    found["steps"] = bench_steps(options.rounds, options.steps)
    for row in found["steps"]:
        low, middle, high = row["ratio"]
        name = f"{row['network']}, {row['masks']}"
        print(f"{name:42} {row['plain_ms']:8.1f} ms without; with / without {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)
    weight = torch.zeros(1000, 1000)
    found["mask_bytes_per_weight"] = torch.ones_like(weight, dtype=torch.bool).element_size()
    print(f"masks: {found['mask_bytes_per_weight']} byte per weight")
    found["channels"] = row = bench_channels(options.rounds)
    low, middle, high = row["others_longer"]["dense"]
    before, after = row["parameters"]
    less = before / after
    print(f"ResNet-18, half of the channels removed: {less:.1f} x fewer parameters, speed-up {middle:.2f} ({low:.2f} to {high:.2f})")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    missed = 0
    for label, target in TARGETS.items():
        worst = max(row["ratio"][1] for row in found["steps"] if row["masks"] == label and row["network"] != SMALL_BATCH)
        print(f"{label}: largest median ratio {worst:.3f}, target {target}: {'met' if worst <= target else 'missed'}")
        missed += worst > target
    print(f"removed channels: speed-up {middle:.2f}, target above 1: {'met' if middle > 1 else 'missed'}")
    return int(missed or middle <= 1)


if __name__ == "__main__":
    raise SystemExit(main())
