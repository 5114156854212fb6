"""What learning from few, noisy or skewed labels costs: each technique beside the plain supervised loop, OPIS, and single functions.

    python benchmarks/labels.py [--rounds 5] [--steps 4] [--threads 1] [--only NAME ...] [--json FILE]

1. A training step on random images of 3 x 64 x 64, batch 64, with a ResNet-18 (for AdaWAC and ADELE a small U-Net on 1 x 64 x 64), with
   each technique and without it. FixMatch and its successors have 64 unlabelled images beside the labelled ones, in two views. A step's
   time falls into ``passes``, everything inside the networks, forward and backward; ``optimiser``; and the rest, which is maths: losses,
   their gradients with respect to what the networks put out, tables, queues, averages of weights, and Lightning. The difference to the
   plain side is what the technique adds: extra passes, which are the method, and extra maths. Target: extra maths at most 5 % of the
   technique's step. A round runs both sides, the first of them in turns, and takes the median step; printed are medians over rounds.
   ``state`` is what the technique adds to a checkpoint, ``frozen`` the weights that it holds beside it.
2. OPIS of 60,000 embeddings of 128 numbers and 11,000 classes, in a process of its own: seconds, and the peak of that process's memory.
   Target: less than 2 GB.
3. Functions beside the formulation that their equations suggest, which is written here: FDS's statistics of an epoch bucket by bucket from
   all features at once, Dice with one-hot targets, cosines of unit vectors that are made for each loss anew. Both take turns; printed are
   medians of seconds, forward and backward, and the ratio plain / ours. Memory is the growth of a process that does nothing else.
   Target: ratios of at least 1.

Use an idle machine. The correction of labels by ADELE happens between epochs and isn't in its step.
"""

import argparse
import copy
import json
import logging
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from lit_methods import OPIS, FixMatch, ImageSegmentor, ImbalancedRegression, LabelStore, ShrinkMatch, SimMatchV2, SmallUNet2d
from lit_methods.callbacks import ADELE, TCM, AdaWAC, ConR, TwoTowerConsistency
from lit_methods.callbacks.imbalanced_regression.fds.core import Moments, MomentSums, pooled
from lit_methods.callbacks.noisy_labels.adawac.core import adawac_loss
from lit_methods.frozen import Frozen
from lit_methods.prompting.coprompt.core import coprompt_loss

WARM_UP = 2
BATCH, CLASSES, PIXELS = 64, 10, 64
MATHS, BYTES = 0.05, 2e9  # the targets


class Clock:
    """Seconds inside networks and optimisers, and what measuring itself took, of the step that is under way."""

    def __init__(self) -> None:
        self.passes = self.optimiser = self.measuring = 0.0
        self.outputs: list[Tensor] = []

    def begin(self) -> None:
        """A new step."""
        self.__init__()  # type: ignore[misc]


CLOCK = Clock()


class Timed(nn.Module):
    """A network whose forward pass is timed, and whose outputs are known to :func:`timed_backward`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """What the network puts out."""
        begin = time.perf_counter()
        answer: Tensor = self.net(x)
        CLOCK.passes += time.perf_counter() - begin
        if answer.requires_grad:
            CLOCK.outputs.append(answer)
        return answer


def timed_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """The backward pass; its part above the networks is done twice, so that it can be told from theirs."""
    begin = time.perf_counter()
    torch.autograd.grad(loss, CLOCK.outputs, retain_graph=True, allow_unused=True)
    above = time.perf_counter() - begin
    loss.backward()
    CLOCK.passes += time.perf_counter() - begin - 2 * above
    CLOCK.measuring += above


class Laps(pl.Callback):
    """Seconds of each step, by part."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._begin: float | None = None

    def _end(self) -> None:
        if self._begin is not None:
            whole = time.perf_counter() - self._begin - CLOCK.measuring
            rest = whole - CLOCK.passes - CLOCK.optimiser
            self.steps.append({"step": whole, "passes": CLOCK.passes, "optimiser": CLOCK.optimiser, "maths": rest})

    def on_train_batch_start(self, *args: Any) -> None:
        """The step before ends, with what other callbacks did behind it."""
        self._end()
        CLOCK.begin()
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, *args: Any) -> None:
        """The last step ends."""
        self._end()
        self._begin = None


class Plain(pl.LightningModule):
    """Cross-entropy of a linear layer on a backbone."""

    def __init__(self, key: str | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.key = backbone(), nn.Linear(512, CLASSES), key

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, of the labelled images alone."""
        part = batch if self.key is None else batch[self.key]
        return nn.functional.cross_entropy(self.head(self.backbone(part["image"])), part["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of the semi-supervised modules."""
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9, nesterov=True)


class TwoTowers(Plain):
    """Images and classes in one space."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Timed(nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 512)))
        self.register_buffer("words", torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(0)))
        self.head = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of the cosines."""
        images, texts = self.backbone(batch["image"]), self.text(self.get_buffer("words"))
        cosines = nn.functional.normalize(images, dim=1) @ nn.functional.normalize(texts, dim=1).T
        return nn.functional.cross_entropy(10 * cosines, batch["label"])


def backbone() -> nn.Module:
    """A ResNet-18 without its classifier."""
    network = resnet18()
    network.fc = nn.Identity()
    return Timed(network)


def segmentor() -> pl.LightningModule:
    """A small U-Net."""
    return ImageSegmentor(Timed(SmallUNet2d(num_classes=4, in_channels=1, widths=(16, 32, 64))), num_classes=4)


def regression() -> pl.LightningModule:
    """A number for each image."""
    return ImbalancedRegression(backbone(), nn.Linear(512, 1))


class Case(NamedTuple):
    """Both sides, and the kind of their batches."""

    plain: Callable[[], pl.LightningModule]
    technique: Callable[[], pl.LightningModule]
    callbacks: Callable[[], list[pl.Callback]]
    batches: str


def adele() -> list[pl.Callback]:
    """What ADELE does in a step: it counts. The labels that it would change between epochs are 64 small ones."""
    store = LabelStore.create(tempfile.mkdtemp(), np.zeros((BATCH, 8, 8), dtype=np.int64))
    return [ADELE(num_classes=4, correct=False, tracked="label", store=store, loader=[])]


SEMI = {"feature_dim": 512, "num_classes": CLASSES, "schedule": "constant"}
CASES: dict[str, Case] = {
    "FixMatch": Case(lambda: Plain("labelled"), lambda: FixMatch(backbone(), **SEMI), list, "semi"),
    "ShrinkMatch": Case(lambda: Plain("labelled"), lambda: ShrinkMatch(backbone(), **SEMI), list, "semi"),
    "SimMatchV2": Case(
        lambda: Plain("labelled"),
        lambda: SimMatchV2(backbone(), num_labelled=1280, bank_size=64 * 256, **SEMI),
        list,
        "semi",
    ),
    "TCM": Case(Plain, Plain, lambda: [TCM("backbone")], "classes"),
    "ConR": Case(regression, regression, lambda: [ConR(views=["view_1", "view_2"])], "numbers"),
    "AdaWAC": Case(segmentor, segmentor, lambda: [AdaWAC(features="network.net.bottleneck", num_samples=10_000)], "slices"),
    "ADELE, tracking": Case(segmentor, segmentor, adele, "slices"),
    "CoPrompt's term": Case(TwoTowers, TwoTowers, lambda: [TwoTowerConsistency("backbone", "text")], "classes"),
}


class Batches(pl.LightningDataModule):
    """A loader, and what SimMatchV2 asks for: the classes of the labelled images."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader, self.labelled_classes = loader, torch.arange(1280) % CLASSES

    def train_dataloader(self) -> Any:
        """The loader."""
        return self.loader


def batches(kind: str, count: int) -> Any:
    """A loader of random batches."""
    generator = torch.Generator().manual_seed(0)

    def images(channels: int = 3) -> Tensor:
        return torch.randn(BATCH, channels, PIXELS, PIXELS, generator=generator)

    def draw(top: int, *shape: int) -> Tensor:
        return torch.randint(top, (BATCH, *shape), generator=generator)

    def one(number: int) -> dict[str, Tensor]:
        if kind == "classes":
            return {"image": images(), "image_second": images(), "label": draw(CLASSES)}
        if kind == "numbers":
            return {
                "image": images(),
                "view_1": images(),
                "view_2": images(),
                "target": draw(60, 1).float(),
                "weight": torch.ones(BATCH, 1),
            }
        return {
            "image": images(1), "image_2": images(1), "label": draw(4, PIXELS, PIXELS), "label_2": draw(4, PIXELS, PIXELS),
            "index": (torch.arange(BATCH) + number * BATCH) % 10_000,
        }  # fmt: skip

    if kind != "semi":
        return DataLoader([one(number) for number in range(count)], batch_size=None)  # type: ignore[arg-type]
    labelled = [{"image": images(), "label": draw(CLASSES), "index": draw(1280)} for _ in range(count)]
    unlabelled = [{"weak": images(), "strong": [images()], "index": draw(10_000)} for _ in range(count)]
    parts = {"labelled": labelled, "unlabelled": unlabelled}
    return CombinedLoader({name: DataLoader(own, batch_size=None) for name, own in parts.items()}, "max_size_cycle")  # type: ignore[arg-type]


def fit(make: Callable[[], pl.LightningModule], callbacks: list[pl.Callback], loader: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step by part, and megabytes of state."""
    torch.manual_seed(0)
    module, laps = make(), Laps()
    held = _megabytes(module, [])
    module.backward = timed_backward  # type: ignore[method-assign]
    configure = module.configure_optimizers

    def configured() -> Any:
        made = configure()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        inner = optimizer.step

        def step(closure: Callable[[], Any] | None = None) -> Any:
            found = None if closure is None else closure()
            begin = time.perf_counter()
            inner()
            CLOCK.optimiser += time.perf_counter() - begin
            return found

        optimizer.step = step
        return made

    module.configure_optimizers = configured  # type: ignore[method-assign]
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[laps, *callbacks],
    )  # fmt: skip
    trainer.fit(module, datamodule=Batches(loader))
    steps = laps.steps[WARM_UP:]
    held["state"] = _megabytes(module, callbacks)["state"]
    held["frozen"] += sum(_size(frozen.module) for callback in callbacks for frozen in getattr(callback, "_teachers", {}).values())
    return {part: statistics.median(step[part] for step in steps) for part in steps[0]}, held


def _size(module: nn.Module) -> float:
    return sum(value.nbytes for value in module.state_dict().values()) / 1e6


def _megabytes(module: nn.Module, callbacks: list[pl.Callback]) -> dict[str, float]:
    tables = [value for callback in callbacks for value in callback.state_dict().values() if isinstance(value, Tensor)]
    frozen = sum(_size(part.module) for part in module.modules() if isinstance(part, Frozen))
    return {"state": _size(module) + sum(table.nbytes for table in tables) / 1e6, "frozen": frozen}


def measure(case: Case, rounds: int, steps: int) -> dict[str, float]:
    """Medians over the rounds."""
    loader = batches(case.batches, WARM_UP + steps)
    sides: dict[str, list[dict[str, float]]] = {"plain": [], "technique": []}
    memory: dict[str, dict[str, float]] = {}
    for number in range(rounds):
        for side in ("plain", "technique") if number % 2 else ("technique", "plain"):
            make, callbacks = (case.plain, []) if side == "plain" else (case.technique, case.callbacks())
            found, memory[side] = fit(make, callbacks, copy.copy(loader))
            sides[side].append(found)
    pairs = list(zip(sides["plain"], sides["technique"], strict=True))
    middle = {f"{side}_ms": 1e3 * statistics.median(one["step"] for one in own) for side, own in sides.items()}
    return middle | {
        "ratio": statistics.median(b["step"] / a["step"] for a, b in pairs),
        "passes_share": statistics.median((b["passes"] - a["passes"]) / b["step"] for a, b in pairs),
        "maths_ms": 1e3 * statistics.median(b["maths"] - a["maths"] for a, b in pairs),
        "maths_share": statistics.median((b["maths"] - a["maths"]) / b["step"] for a, b in pairs),
        "state_mb": memory["technique"]["state"] - memory["plain"]["state"],
        "frozen_mb": memory["technique"]["frozen"],
    }


def peak_megabytes() -> float:
    """Largest resident memory of this process since it began."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also knows what the process held that started this one
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def opis(threads: int, results: Any) -> None:
    """OPIS of 60,000 embeddings, in a process that does nothing else."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60_000) % 11_000
    centre = torch.randn(11_000, 128, generator=generator)
    metric = OPIS()
    metric.update(centre[labels] + torch.randn(60_000, 128, generator=generator), labels)
    begin = time.perf_counter()
    value = float(metric.compute()["opis"])
    seconds = time.perf_counter() - begin
    results.put({"opis": value, "seconds": seconds, "peak_mb": peak_megabytes()})


# ---- single functions ------------------------------------------------------------------------------------------------------------------


class Function(NamedTuple):
    """Ours and the plain one: each makes a number from the same inputs."""

    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def _epoch() -> tuple[Tensor, ...]:
    """12,000 features of 512 numbers in batches of 64, with ages."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12_000, 512, generator=generator).relu(), torch.randint(0, 100, (12_000,), generator=generator)


def _epoch_ours(features: Tensor, buckets: Tensor) -> Tensor:
    sums = MomentSums(102)
    for part, at in zip(features.split(64), buckets.split(64), strict=True):
        sums.add(part, at + 1)
    found = sums.moments()
    assert isinstance(found, Moments)
    _, mean, variance = pooled(found)
    return mean.sum() + variance.sum()


def _epoch_plain(features: Tensor, buckets: Tensor) -> Tensor:
    whole = torch.cat([part.clone() for part in features.split(64)])
    of_buckets = [whole[buckets == bucket].double() for bucket in range(100)]
    return torch.stack([own.mean(0).sum() + own.var(0).sum() for own in of_buckets]).sum()


def _slices() -> tuple[Tensor, ...]:
    """Logits of two views of 16 slices, 9 classes; labels; features; weights."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(16, 9, 112, 112, generator=generator, requires_grad=True) for _ in range(2)]
    labels = [torch.randint(0, 9, (16, 112, 112), generator=generator) for _ in range(2)]
    latents = [torch.randn(16, 64, 7, 7, generator=generator, requires_grad=True) for _ in range(2)]
    return (*logits, *labels, *latents, torch.full((16, 2), 0.5))


def _adawac_ours(a: Tensor, b: Tensor, y: Tensor, z: Tensor, u: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return adawac_loss((a, b), (y, z), (u, v), weights).loss


def _adawac_plain(a: Tensor, b: Tensor, y: Tensor, z: Tensor, u: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    ce, dice = [], []
    for logits, labels in ((a, y), (b, z)):
        ce.append(nn.functional.cross_entropy(logits, labels, reduction="none").mean((1, 2)))
        p, target = logits.softmax(1), nn.functional.one_hot(labels, 9).movedim(-1, 1).float()
        parts = [(2 * (p[:, c] * target[:, c]).sum() + 1e-5) / (p[:, c].square().sum() + target[:, c].sum() + 1e-5) for c in range(9)]
        dice.append(1 - torch.stack(parts).mean())
    entropy, consistency = (ce[0] + ce[1]) / 2, 2 * (u - v).square().mean((1, 2, 3))
    stepped = (weights.log() + torch.stack([entropy, consistency], 1).detach()).softmax(1)
    return 0.25 * (dice[0] + dice[1]) + 0.5 * (stepped[:, 0] * entropy + stepped[:, 1] * consistency).mean()


def _embeddings() -> tuple[Tensor, ...]:
    """64 images and 1,000 classes of 512 numbers, from both towers."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(size, 512, generator=generator, requires_grad=True) for size in (64, 1000))
    other_image, other_text = (torch.randn(size, 512, generator=generator) for size in (64, 1000))
    return image, text, other_image, other_text, torch.randint(0, 1000, (64,), generator=generator)


def _coprompt_ours(image: Tensor, text: Tensor, other_image: Tensor, other_text: Tensor, labels: Tensor) -> Tensor:
    return coprompt_loss(image, text, other_image, other_text, labels, logit_scale=10.0).total


def _coprompt_plain(image: Tensor, text: Tensor, other_image: Tensor, other_text: Tensor, labels: Tensor) -> Tensor:
    unit_image, unit_text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    entropy = nn.functional.cross_entropy(10.0 * unit_image @ unit_text.T, labels)
    pairs = ((unit_image, other_image), (unit_text, other_text))
    return entropy + 8 * sum(1 - nn.functional.cosine_similarity(own, other, dim=1).mean() for own, other in pairs)


FUNCTIONS: dict[str, Function] = {
    "FDS, an epoch": Function(_epoch, _epoch_ours, _epoch_plain),
    "AdaWAC's loss": Function(_slices, _adawac_ours, _adawac_plain),
    "CoPrompt's loss": Function(_embeddings, _coprompt_ours, _coprompt_plain),
}


def resident(name: str, side: str, threads: int, results: Any) -> None:
    """Peak of the memory of a process that makes the inputs and calls one side; ``side`` "none": the inputs alone."""
    torch.set_num_threads(threads)
    function = FUNCTIONS[name]
    inputs = function.inputs()
    if side != "none":
        value = getattr(function, side)(*inputs)
        if value.requires_grad:
            value.backward()
    results.put(peak_megabytes())


def peak_of(name: str, side: str, threads: int) -> float:
    """:func:`resident` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=resident, args=(name, side, threads, results))
    process.start()
    peak: float = results.get()
    process.join()
    return peak


def compare(function: Function, rounds: int) -> dict[str, float]:
    """Medians of seconds of both, which must agree."""
    inputs = function.inputs()
    learns = [part for part in inputs if part.requires_grad]
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    values = {}
    for number in range(rounds + 1):
        for side in ("ours", "plain") if number % 2 else ("plain", "ours"):
            begin = time.perf_counter()
            value = getattr(function, side)(*inputs)
            if learns:
                torch.autograd.grad(value, learns)
            if number:
                seconds[side].append(time.perf_counter() - begin)
            values[side] = value.detach().double()
    torch.testing.assert_close(values["ours"], values["plain"], rtol=1e-5, atol=1e-6)
    pairs = zip(seconds["plain"], seconds["ours"], strict=True)
    return {f"{side}_ms": 1e3 * statistics.median(own) for side, own in seconds.items()} | {
        "ratio": statistics.median(plain / ours for plain, ours in pairs)
    }


def main() -> int:
    """Measure, print, and say whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of fits (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a fit (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    known = [*CASES, "OPIS", *FUNCTIONS]
    parser.add_argument("--only", nargs="*", default=known, help="some of: " + ", ".join(known))
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    figures: dict[str, Any] = {
        "options": {key: value for key, value in vars(options).items() if key not in ("json", "only")},
        "steps": {},
        "functions": {},
    }
    print(f"1. A training step, batch {BATCH}, beside the plain supervised loop")
    print(
        f"{'':17}{'plain ms':>9}{'with ms':>9}{'ratio':>7}{'extra passes':>14}{'extra maths':>13}{'ms':>8}{'state MB':>10}{'frozen MB':>11}"
    )
    missed = []
    for name, case in CASES.items():
        if name not in options.only:
            continue
        found = figures["steps"][name] = measure(case, options.rounds, options.steps)
        print(
            f"{name:17}{found['plain_ms']:9.0f}{found['technique_ms']:9.0f}{found['ratio']:7.2f}{found['passes_share']:13.1%} "
            f"{found['maths_share']:12.1%} {found['maths_ms']:8.1f}{found['state_mb']:10.2f}{found['frozen_mb']:11.1f}"
        )
        if found["maths_share"] > MATHS:
            missed.append(f"{name}: extra maths {found['maths_share']:.1%}")
    if "OPIS" in options.only:
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=opis, args=(options.threads, results))
        process.start()
        found = figures["opis"] = results.get()
        process.join()
        print(f"\n2. OPIS of 60,000 x 128: {found['seconds']:.1f} s, peak of the process {found['peak_mb']:.0f} MB")
        if found["peak_mb"] * 1e6 > BYTES:
            missed.append(f"OPIS: {found['peak_mb']:.0f} MB")
    print(f"\n3. Functions beside a plain formulation\n{'':17}{'plain ms':>9}{'ours ms':>9}{'ratio':>7}{'plain MB':>10}{'ours MB':>9}")
    for name, function in FUNCTIONS.items():
        if name not in options.only:
            continue
        found = figures["functions"][name] = compare(function, options.rounds)
        base = peak_of(name, "none", options.threads)
        found |= {f"{side}_mb": peak_of(name, side, options.threads) - base for side in ("plain", "ours")}
        print(
            f"{name:17}{found['plain_ms']:9.1f}{found['ours_ms']:9.1f}{found['ratio']:7.2f}{found['plain_mb']:10.1f}{found['ours_mb']:9.1f}"
        )
        if found["ratio"] < 1:
            missed.append(f"{name}: plain / ours {found['ratio']:.2f}")
    verdict = "; ".join(missed) + ": MISSED" if missed else "met"
    print(f"\ntargets: extra maths <= {MATHS:.0%} of a step, OPIS below {BYTES / 1e9:g} GB, ratios >= 1: {verdict}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
