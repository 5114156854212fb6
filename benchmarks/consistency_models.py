"""What consistency models cost: where a training step goes, what Lightning adds to a bare loop, and how fast samples are drawn.

    python benchmarks/consistency_models.py [--rounds 5] [--steps 10] [--batch 16] [--threads 1] [--json FILE]

1. A training step of each module on random images of 3 x 32 x 32: images per second, and shares of its time. ``student`` and ``teacher``
   are forward passes with and without a gradient (for rCM ``student`` has the derivative along the path, ``critic`` is the learned score);
   ``metric`` is distances and contrasts, ``coupling`` the assignment of noise to data, ``backward`` and ``optimiser`` as they say. ``rest``
   is what is left: drawing noise and levels, preconditioning, and Lightning. CT, iCT, sLCT and rCM train the same U-Net, EPG vision
   transformers on patches of 4 x 4. An rCM "step" is the mean of its iterations: one of the student, then those of the critic.
2. iCT by ``Trainer.fit`` beside a bare loop over the same batches, made of ``lit_methods.functional``: the same noise and levels, and the
   script fails if the weights at the end are not equal. A round runs both, the first of them in turns, and takes the median step; the ratio
   is Lightning / bare of one round, its median and quartiles are printed. Target: at most 1.05.
3. Samples per second in 1, 2 and 4 steps, without a gradient. A step is one network call: 2 and 4 should take about 2 and 4 times as long.

Use an idle machine. Everything runs in this process with ``--threads`` torch threads.
"""

import argparse
import copy
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_methods import (
    RCM,
    SLCT,
    AugmentedViews,
    ConsistencyTraining,
    EPGFinetune,
    EPGPretrain,
    PixelViTDecoder,
    PixelViTEncoder,
    SmallUNet,
)
from lit_methods.consistency_models.epg import core as epg
from lit_methods.consistency_models.pair_training import PairTraining
from lit_methods.consistency_models.slct import module as slct
from lit_methods.functional import (
    consistency_function,
    consistency_pair_loss,
    doubling_levels,
    inverse_gap,
    karras_levels,
    lognormal_probabilities,
    pseudo_huber,
)
from lit_methods.seeds import own_seed

WARM_UP = 2
TARGET = 1.05
SHAPE = (3, 32, 32)
PARTS = ("student", "teacher", "critic", "metric", "coupling", "backward", "optimiser", "rest")


def unet() -> SmallUNet:
    """The network of CT, iCT, sLCT and rCM."""
    return SmallUNet(in_channels=3, channels=32, multipliers=(1, 2))


def encoder() -> PixelViTEncoder:
    """EPG's."""
    return PixelViTEncoder(image_size=32, patch_size=4, in_channels=3, width=128, depth=4, heads=4)


def decoder() -> PixelViTDecoder:
    """EPG's."""
    return PixelViTDecoder(image_size=32, patch_size=4, in_channels=3, width=128, encoder_width=128, depth=4, heads=4)


SHORT = {"warmup_steps": 0, "schedule": "constant"}  # of EPG
MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "CT": lambda: ConsistencyTraining(
        unet(),
        curriculum="square_root",
        s0=2,
        s1=150,
        levels="uniform",
        metric="l2",
        weight="one",
        teacher="ema",
        sample_times=(5.0, 1.1, 0.4),
    ),
    "iCT": lambda: ConsistencyTraining(unet(), sample_times=(5.0, 1.1, 0.4)),
    "sLCT": lambda: SLCT(unet(), sample_times=(5.0, 1.1, 0.4)),
    "EPG, stage 1": lambda: EPGPretrain(encoder(), AugmentedViews(), projector_width=512, projector_dim=64, total_steps=1000, **SHORT),
    "EPG, diffusion": lambda: EPGFinetune(encoder(), decoder(), total_steps=1000, **SHORT),
    "EPG, consistency": lambda: EPGFinetune(encoder(), decoder(), mode="consistency", sample_times=(5.0, 1.1, 0.4), **SHORT),
    "rCM": lambda: RCM(unet(), tangent_warmup=0, sample_steps=(1, 2, 4)),
}
FASTEST = {"CT": 4, "iCT": 4, "sLCT": 4, "EPG, consistency": 4, "rCM": 4}  # those with few steps: their largest number here


class Clock:
    """Seconds by part. What is timed inside something that is timed counts for the inner part alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, part: str | Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            name = part if isinstance(part, str) else part()
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - begin
                self.seconds[name] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return run


def by_gradient() -> str:
    """A forward pass without a gradient is the teacher's."""
    return "student" if torch.is_grad_enabled() else "teacher"


@contextmanager
def watched(module: pl.LightningModule, clock: Clock) -> Iterator[None]:
    """Times networks, metrics, coupling and the backward pass of a module."""
    replaced: list[tuple[Any, str, Any]] = []

    def watch(owner: Any, name: str, part: str | Callable[[], str]) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, clock.timed(part, getattr(owner, name)))

    roles = {"student": "student", "teacher": "teacher", "critic": "critic"} if isinstance(module, RCM) else {}
    for name, part in roles.items():
        network = getattr(module, name)
        watch(getattr(network, "module", network), "forward", part)  # a frozen network hides in a holder
    for name in ("network", "teacher_network", "encoder", "decoder", "projector", "target_encoder", "target_projector"):
        if isinstance(network := getattr(module, name, None), nn.Module):
            watch(network, "forward", by_gradient)
    if isinstance(module, PairTraining):
        watch(module, "distance", "metric")
        watch(slct, "early_diffusion_loss", "metric")
        watch(slct, "couple", "coupling")
    for name in ("detached_pseudo_huber", "cosine_info_nce", "square"):
        watch(epg, name, "metric")
    watch(module, "backward", "backward")
    try:
        yield
    finally:
        for owner, name, before in replaced:
            if isinstance(owner, nn.Module):
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class Laps(pl.Callback):
    """When each training batch begins, and the end."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock, self.times = clock, [0.0] * 0

    def on_train_batch_start(self, *args: Any) -> None:
        """Forget what was timed before the warm-up is over."""
        if self.clock is not None and len(self.times) == WARM_UP:
            self.clock.seconds.clear()
        self.times.append(time.perf_counter())

    def on_train_end(self, *args: Any) -> None:
        """The last batch is over."""
        self.times.append(time.perf_counter())


def batches(count: int, size: int) -> list[dict[str, Tensor]]:
    """Random images in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.rand(size, *SHAPE, generator=generator) * 2 - 1} for _ in range(count)]


def fit(module: pl.LightningModule, data: list[dict[str, Tensor]], clock: Clock | None = None) -> list[float]:
    """Train on each batch once; seconds of the steps behind the warm-up."""
    laps = Laps(clock)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[laps],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return [b - a for a, b in itertools.pairwise(laps.times)][WARM_UP:]


def split(name: str, data: list[dict[str, Tensor]]) -> dict[str, float]:
    """Images per second of a module's training step, and the share of each part."""
    torch.manual_seed(0)
    module, clock = MODULES[name](), Clock()
    make = module.configure_optimizers

    def configure() -> Any:
        made = make()
        first = made[0] if isinstance(made, tuple) else made
        for one in first if isinstance(first, list) else [first["optimizer"] if isinstance(first, dict) else first]:
            inner = one.step

            def step(closure: Callable[[], Any] | None = None, inner: Callable[..., Any] = inner) -> Any:
                found = closure() if closure is not None else None
                clock.timed("optimiser", inner)()
                return found

            one.step = step
        return made

    module.configure_optimizers = configure  # type: ignore[method-assign]
    with watched(module, clock):
        seconds = fit(module, data, clock)
    total = sum(seconds)
    shares = {part: clock.seconds[part] / total for part in PARTS if part != "rest"}
    return {"images_per_second": len(seconds) * len(data[0]["image"]) / total} | shares | {"rest": 1 - sum(shares.values())}


def bare_ict(network: nn.Module, data: list[dict[str, Tensor]]) -> list[float]:
    """Consistency training (iCT) without Lightning, with the draws of ``ConsistencyTraining``; seconds of the steps behind the warm-up."""
    optimizer = torch.optim.RAdam(network.parameters(), lr=1e-4, eps=1e-8)
    network.train()
    f = consistency_function(network)
    tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    times = []
    for number, batch in enumerate(DataLoader(data, batch_size=None)):  # type: ignore[arg-type, var-annotated]
        times.append(time.perf_counter())
        x = batch["image"]
        count = doubling_levels(number, len(data), 10, 1280)
        if count not in tables:
            sigma = karras_levels(count)
            tables[count] = (
                sigma.float(),
                lognormal_probabilities(sigma, -1.1, 2.0).float(),
                inverse_gap(sigma[:-1], sigma[1:]).float(),
            )
        sigma, chances, weights = tables[count]
        generator = torch.Generator().manual_seed(own_seed(f"ConsistencyTraining 0 {number}", 0))
        index = torch.multinomial(chances, len(x), replacement=True, generator=generator) + 1
        noise = torch.randn(x.shape, generator=generator)
        c = 0.00054 * x[0].numel() ** 0.5
        found = consistency_pair_loss(
            f, f, x, noise, sigma[index - 1], sigma[index], lambda a, b, c=c: pseudo_huber(a, b, c), weights[index - 1]
        )
        optimizer.zero_grad()
        found.losses.mean().backward()
        optimizer.step()
        del found  # else its graph lives on while the next one is built
    times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)][WARM_UP:]


def overhead(rounds: int, data: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Median step of Lightning over that of a bare loop, by round."""
    torch.manual_seed(0)
    start = unet()
    sides: dict[str, list[float]] = {"bare": [], "lightning": []}
    for number in range(rounds):
        ends = {}
        for side in ("bare", "lightning") if number % 2 else ("lightning", "bare"):
            network = copy.deepcopy(start)
            seconds = bare_ict(network, data) if side == "bare" else fit(ConsistencyTraining(network), data)
            sides[side].append(statistics.median(seconds))
            ends[side] = network.state_dict()
        for name, value in ends["bare"].items():
            assert torch.equal(value, ends["lightning"][name]), f"both sides should end alike, but {name} differs"
    ratios = [b / a for a, b in zip(sides["bare"], sides["lightning"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "bare_ms": statistics.median(sides["bare"]) * 1e3,
        "lightning_ms": statistics.median(sides["lightning"]) * 1e3,
        "ratio_quartiles": [low, middle, high],
    }


@torch.no_grad()
def sampling(name: str, rounds: int, size: int) -> dict[str, float]:
    """Samples per second in 1, 2 and 4 steps, the median of some rounds."""
    torch.manual_seed(0)
    module: Any = MODULES[name]().eval()
    noise = torch.randn(size, *SHAPE)
    seconds: dict[int, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        for steps in (1, 2, 4):
            begin = time.perf_counter()
            module.sample(noise, steps=steps, generator=torch.Generator().manual_seed(0))
            seconds[steps].append(time.perf_counter() - begin)
    return {f"{steps}_steps": size / statistics.median(taken[1:]) for steps, taken in seconds.items()}


def main() -> int:
    """Measure, print, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of fits, and rounds of sampling (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a fit, for rCM a multiple of 5 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = batches(WARM_UP + options.steps, options.batch)
    figures: dict[str, Any] = {"options": {key: value for key, value in vars(options).items() if key != "json"}}

    print(f"1. A training step, batch {options.batch}: images per second, and shares of its time in %")
    print(f"{'':18}{'images/s':>9}" + "".join(f"{part:>11}" for part in PARTS))
    figures["training"] = {}
    for name in MODULES:
        found = figures["training"][name] = split(name, data)
        print(f"{name:18}{found['images_per_second']:9.1f}" + "".join(f"{100 * found[part]:11.1f}" for part in PARTS))

    found = figures["overhead"] = overhead(options.rounds, data)
    print("\n2. iCT by Trainer.fit beside a bare loop; the weights at the end are equal")
    print(f"{'bare, ms':>10}{'Lightning, ms':>15}{'ratio: lower quartile, median, upper':>40}")
    print(f"{found['bare_ms']:10.1f}{found['lightning_ms']:15.1f}{'   '.join(f'{ratio:.3f}' for ratio in found['ratio_quartiles']):>40}")

    print(f"\n3. Samples per second, {options.batch} at a time\n{'':18}{'1 step':>9}{'2 steps':>9}{'4 steps':>9}")
    figures["sampling"] = {}
    for name in FASTEST:
        found = figures["sampling"][name] = sampling(name, options.rounds, options.batch)
        print(f"{name:18}" + "".join(f"{found[f'{steps}_steps']:9.1f}" for steps in (1, 2, 4)))

    met = figures["overhead"]["ratio_quartiles"][1] <= TARGET
    print(f"\ntarget: median ratio of Lightning to a bare loop <= {TARGET}: {'met' if met else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
