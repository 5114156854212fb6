"""ISS-P as a callback.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.issp.core`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.callbacks.sparsity.callback import MaskCallback
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.history import MaskHistory, flips
from lit_methods.callbacks.sparsity.issp import core
from lit_methods.callbacks.twin import shadow, validation_batches
from lit_methods.callbacks.wrapping import attach, detach
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global, logs_now

TECHNIQUE = Technique(
    slug="issp",
    short="ISS-P",
    title="Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution",
    arxiv="2303.09650",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.IterativeSoftShrinkage", "lit_methods.SuperResolution"),
    configs=("issp.yaml",),
    golden=("pick_pruned", "shrink_steps", "sr_metric"),
    claim="At 90 % pruned, a super-resolution network trained by ISS-P reaches a higher PSNR than one with a random static mask.",
    summary="Prunes a network from a random start: the smallest weights shrink a little at every step and may come back, until a switch.",
)

Method = Literal["iss_p", "iht", "iss_r", "assl", "l1", "scratch", "random"]


class IterativeSoftShrinkage(MaskCallback):
    """Prunes a network while it is trained from a random start: the smallest weights shrink a little at every step, and may come back.

    After each of the first ``prune_iters`` optimiser steps, the share ``pr`` of smallest magnitudes is picked anew in every layer and
    multiplied by ``ratio``. Then, at the switch, the last pick becomes the mask: pruned weights are set to 0 and stay there, the rest is
    fine-tuned. ``method`` says what happens before the switch:

    - ``iss_p``: the above (ISS-P)
    - ``iht``: pruned weights are set to 0 instead, and may come back, too (iterative hard thresholding)
    - ``iss_r``: picked every ``reg_interval`` steps; an L2 penalty of its own grows on each picked weight and never falls (ISS-R)
    - ``assl``: picked once, before the first step; the penalty grows on these, then stays for the last ``stabilize_iters`` steps (ASSL, on
      weights instead of filters). Meant for a pretrained network.
    - ``l1``: nothing; at the switch the smallest weights are pruned (one-shot)
    - ``scratch``: the switch comes before the first step: a static mask of the largest initial weights. From pretrained weights that is
      L1-norm pruning.
    - ``random``: the same with a random mask

    Runs: after every step of every optimiser, as a hook of the optimiser itself: accumulation, manual optimisation and AMP (which keeps
    float32 weights) need nothing special, and shrinking happens once per step. Each optimiser counts its own steps. At the switch the
    optimiser goes on: moments of kept weights stay, those of pruned ones are cleared (``mask_optimizer_state``). Afterwards everything is
    as :class:`MaskCallback` says. ``sparsity_masks()`` is all True before the switch, for the network is dense then. Schedulers that
    Lightning steps wait until the switch (``hold_lr``), so that they count from there; schedulers that a module steps by hand don't. All
    DDP ranks have the same weights, so they pick the same; ``fast`` draws from the same seed.

    Saves: what :class:`MaskCallback` saves, the present and the first pick, penalties, and the counts of flips.

    Refuses: what :class:`MaskCallback` refuses, and Lightning's ``StochasticWeightAveraging``.

    Args:
        pr: Share of every layer that is pruned, in [0, 1]; at most 0.995 of a layer.
        method: What happens before the switch, one of the list above.
        ratio: r, factor of pruned weights per step, in [0, 1]: 1 less the shrinkage percentage. Authors: 0.95.
        prune_iters: Optimiser steps before the switch, >= 1; authors: 100,000. ``scratch`` and ``random`` have none.
        pick: ``min``; ``min_N:M``: N of every M consecutive weights of the flattened layer are pruned instead, N and M raised until M
            divides all layers' sizes; ``fast``: by a threshold from 32,400 weights of the layer, drawn with repetition, for large layers.
        reg_interval: Steps between two updates of the penalty.
        reg_delta: What an update adds; None: so much that ``reg_limit`` is reached when growth ends. Authors: 1e-4.
        reg_limit: The penalty stops there.
        stabilize_iters: Last steps before the switch without growth, for ``assl``; authors: 43,150 (after 100,000).
        hold_lr: Schedulers wait. A warm-up would wait, too: set it to False then.
        probe: Name of a method of the module that maps a batch to (B,) values, such as ``psnr_y`` of ``SuperResolution``. Its mean over
            the validation batches is taken with pruned weights as they were and with 0 in their place. None: not measured.
        targets: Patterns of the modules to prune, as ``skip``, ``seed``, ``mask_gradients`` and ``mask_optimizer_state`` in
            :class:`MaskCallback`.

    Raises:
        ValueError: An argument outside its range; at fit start, groups that fit no layers.
    """

    artifact, prefix = "issp_masks{where}", "issp"
    kept: ClassVar[Mapping[str, str]] = {name: f"_{name}" for name in ("penalty", "window", "switch", "switch_at")}
    conflicts_with: ClassVar[Mapping[str, str]] = {
        **MaskCallback.conflicts_with,
        "StochasticWeightAveraging": "a mean over the switch isn't sparse; EMATeacher's copy is masked at the switch",
    }

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Mask flips per 100 steps", ("issp/mask_flips",), note="Weights that go in or out of the pick. Hard thresholding has few."),
        Curve("Kept weights that the first pick kept", ("issp/overlap",), note="Falls while the structure is still being looked for."),
        Curve(
            "Mean |W| of pruned and kept weights",
            ("issp/magnitude_pruned", "issp/magnitude_kept"),
            note="Pruned ones should be small before the switch, or the network jumps there.",
        ),
        Curve("Gradient norm of the layers", ("issp/grad_norm", "issp/grad_norm_smallest"), note="Mean and smallest. Near 0: not trained."),
        Curve("Gradient variance of the layers", ("issp/grad_variance",), note="Mean over the layers."),
        Curve("Density of the pruned layers", ("issp/density",), note="1 until the switch."),
        Curve("Mask flips in all", ("issp/total_flips",)),
        Curve("Pruned weights above 1e-3 at the switch", ("issp/share_above_at_switch",), note="0: the switch changes nothing."),
        Curve("Probe just before and after the switch", ("issp/probe_before", "issp/probe_after")),
        Curve("Probe lost at the switch", ("issp/probe_drop",), note="Before less after."),
        TablePanel("Layers", "issp/layers", note="Gradient norm and variance: of the last logged step."),
    )

    def __init__(
        self,
        pr: float = 0.9,
        method: Method = "iss_p",
        ratio: float = 0.95,
        prune_iters: int = 100_000,
        pick: str = "min",
        reg_interval: int = 20,
        reg_delta: float | None = None,
        reg_limit: float = 0.5,
        stabilize_iters: int = 0,
        hold_lr: bool = True,
        probe: str | None = None,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(targets, skip, seed, mask_gradients, mask_optimizer_state)
        checks.share(pr=pr, ratio=ratio)
        checks.one_of(Method, method=method)
        checks.at_least(1, "optimiser steps", prune_iters=prune_iters, reg_interval=reg_interval)
        if not 0 <= stabilize_iters < prune_iters:
            raise ValueError(f"stabilize_iters={stabilize_iters} are the last of prune_iters={prune_iters}: give fewer, 0 or more")
        checks.positive(reg_limit=reg_limit)
        checks.at_least(0, reg_delta=reg_delta)
        self.pattern = core.parse_pick(pick)
        if self.pattern is not None and self.pattern[0] == self.pattern[1]:
            raise ValueError(f"pick={pick!r} prunes every weight: leave at least one of each group, such as 'min_19:20'")
        self.pr, self.method, self.ratio, self.pick = pr, method, ratio, pick
        self.prune_iters = 0 if method in ("scratch", "random") else prune_iters
        self.reg_interval, self.reg_limit, self.stabilize_iters = reg_interval, reg_limit, stabilize_iters
        updates = max(1, (prune_iters - (stabilize_iters if method == "assl" else 0)) // reg_interval)
        self.reg_delta = reg_limit / updates if reg_delta is None else reg_delta
        self.hold_lr, self.probe = hold_lr, probe
        self._forget()

    def _forget(self) -> None:
        self._granularity = 0
        self._switch_at = self.prune_iters
        self._optimizers: list[torch.optim.Optimizer] = []
        self._waiting: list[Any] = []  # schedulers
        self._picks = MaskHistory("first", "last")
        self._penalty: dict[str, Tensor] = {}
        self._flips = torch.zeros((), dtype=torch.int64)  # of all steps
        self._window = [0, 0]  # step and flips of the last entry in the log
        self._switch: dict[str, Tensor] = {}  # what was measured there
        self._spare: dict[str, Tensor] = {}  # weights just before the switch, until the probe has run
        self._gradient_stats: dict[str, Tensor] = {}  # norm and variance per layer

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        static = self.method in ("scratch", "random")
        return SparsityCard(
            stage="before" if static else "during",
            regime="sparse_to_sparse" if static else "dense_to_sparse",
            mask="dynamic" if self.method in ("iss_p", "iht", "iss_r") else "static",
            granularity="unstructured" if self.pattern is None else "n:m",
            forward_dense=not static,
            backward_dense=not static,
            optimizer_dense=not static,
            criterion="random" if self.method == "random" else "magnitude",
        )

    # ---- set-up ------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights, refuse what can't work, and let schedulers wait."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.probe is not None and not callable(getattr(pl_module, self.probe, None)):
            there = f"probe is {self.probe!r}, but {type(pl_module).__name__} has no such method"
            raise ValueError(f"{there}: name one that maps a batch to (B,) values, or leave probe out")
        if self.hold_lr and self.prune_iters:
            detach(pl_module, self._hold, "lr_scheduler_step")
            attach(pl_module, self._hold, "lr_scheduler_step", around=True)

    def _hold(self, call: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """In the place of ``lr_scheduler_step``: nothing before the switch."""
        if not self._waits(scheduler):
            call(scheduler, *args, **kwargs)

    def _waits(self, scheduler: Any) -> bool:
        """Whether a scheduler has to wait after the step that was just made."""
        if not any(scheduler is own for own in self._waiting):  # a tuner's
            return False
        optimizer = getattr(scheduler, "optimizer", None)
        steps = [step for own, step in zip(self._optimizers, self._steps, strict=True) if own is optimizer] or self._steps
        return max(steps, default=0) <= self._switch_at

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the groups and the switch; a second fit of weights that are pruned already begins behind it."""
        self._forget()
        if self.pattern is not None:
            self._granularity = math.gcd(*(weight.numel() for weight in self.store.weights.values()))
            n, m = core.fitting_pattern(*self.pattern, self._granularity)
            rank_zero_info(f"{type(self).__name__}: {n} of every {m} weights are pruned, {n / m:.2%}")
        if self.store.density() < 1:
            self._switch_at = 0
        self._optimizers, self._waiting = list(trainer.optimizers), [config.scheduler for config in trainer.lr_scheduler_configs]
        self._flips = torch.zeros((), dtype=torch.int64, device=pl_module.device)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Masks, picks, penalties and counts."""
        super().restore({"switch_at": self.prune_iters, **state})
        self._picks.load(state, self.store.weights, picked="last", first="first")
        self._flips.fill_(int(state["flips"]))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make, keep or restore masks and picks."""
        super().on_fit_start(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        if steps < self._switch_at:
            late = f"{steps} optimiser steps, but the switch comes after prune_iters={self.prune_iters}"
            rank_zero_warn(f"{type(self).__name__}: this training has {late}: its weights will stay dense. Train longer, or lower it")

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """All True, but for the methods that start sparse."""
        if self.method not in ("scratch", "random"):
            return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        if self.method == "scratch":
            return {name: ~self._pick(name, weight.detach(), 0) for name, weight in weights.items()}
        pick = "min" if self.pick == "fast" else self.pick
        draws = {name: torch.rand(weight.shape, generator=self.generator) for name, weight in weights.items()}
        return {name: ~core.pick_pruned(draw, self.pr, pick, self._granularity) for name, draw in draws.items()}

    # ---- pruning -----------------------------------------------------------------------------------------------------------------------

    def _shrink(self, name: str, weight: Tensor, step: int, ratio: float) -> tuple[Tensor, Tensor]:
        """A layer after ``step`` steps, and its pruned weights, the same on all ranks."""
        seed = own_seed(f"issp {step} {name}", self.seed) if self.pick == "fast" else 0
        return core.shrink_step(weight, self.pr, ratio, self.pick, self._granularity, seed)

    def _pick(self, name: str, weight: Tensor, step: int) -> Tensor:
        return self._shrink(name, weight, step, 1.0)[1]

    def _note(self, name: str, picked: Tensor) -> None:
        """Count what went in or out of the pick."""
        self._flips += flips(self._picks.last, {name: picked}).to(self._flips.device)
        self._picks.note({name: picked})

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Measure gradients on steps that are logged, add the penalty, mask; before clipping."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        index = self.index_of(trainer, optimizer)
        gradients = {name: grad for name in self._owned[index] if (grad := self.store.weights[name].grad) is not None}
        if gradients and logs_now(pl_module):
            for name, gradient in gradients.items():
                wide = gradient.float()
                self._gradient_stats[name] = torch.stack([wide.norm(), wide.var(correction=0)])
            norms, variances = torch.stack([self._gradient_stats[name].to(pl_module.device) for name in gradients]).unbind(1)
            values = {"grad_norm": norms.mean(), "grad_norm_smallest": norms.min(), "grad_variance": variances.mean()}
            self.log_step(pl_module, values)
        if self._steps[index] < self._switch_at and self.method in ("iss_r", "assl"):
            for name, gradient in gradients.items():
                weight = self.store.weights[name]
                if self.method == "assl" and name not in self._picks.last:
                    self._note(name, self._pick(name, weight.detach(), 0))
                if name in self._penalty:
                    gradient.add_((self._penalty[name] * weight).to(gradient.dtype))

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shrink or penalise the smallest weights; after the last step of the stage, make the masks."""
        if step > self._switch_at:
            return {}
        last, updates = step == self._switch_at, step % self.reg_interval == 0
        grows = updates and (self.method == "iss_r" or (self.method == "assl" and step <= self._switch_at - self.stabilize_iters))
        for name in names:
            weight = self.store.weights[name]
            if self.method in ("iss_p", "iht"):
                ratio = core.shrink_ratio(self.method, self.ratio)  # type: ignore[arg-type]
                shrunk, picked = self._shrink(name, weight.detach(), step, ratio)
                weight.copy_(shrunk)
                self._note(name, picked)
                continue
            if (self.method == "iss_r" and updates) or (last and (self.method != "assl" or name not in self._picks.last)):
                self._note(name, self._pick(name, weight.detach(), step))
            if grows and name in self._picks.last:
                penalty = self._penalty.get(name, torch.zeros_like(weight))
                self._penalty[name] = core.grow_penalty(penalty, self._picks.last[name], self.reg_delta, self.reg_limit)
        return self._make_masks(names) if last else {}

    def _make_masks(self, names: list[str]) -> dict[str, Tensor]:
        """The switch."""
        weights, picked = {name: self.store.weights[name] for name in names}, self._picks.last
        above = sum(((weight.abs() > core.VISIBLE) & picked[name]).sum() for name, weight in weights.items())
        pruned = sum(picked[name].sum() for name in names)
        self._switch["share_above_at_switch"] = torch.as_tensor(above / torch.as_tensor(pruned).clamp(min=1))
        if self.probe is not None:
            self._spare |= {name: weight.detach().clone() for name, weight in weights.items()}
        for name in names:
            self._penalty.pop(name, None)
        return {name: ~picked[name] for name in names}

    # ---- what is shown -----------------------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the switch: averaged copies, the probe. On steps that are logged: flips and magnitudes."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._spare:
            self._probe_switch(trainer, pl_module)
        step = max(self._steps, default=0)
        accumulates = pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()
        if not self._picks.last or not logs_now(pl_module) or accumulates or step == self._window[0]:
            return
        total = int(self._flips)  # waits for the device, on logged steps alone
        values = {**self._magnitudes(), "mask_flips": (total - self._window[1]) * 100 / (step - self._window[0])}
        self._window = [step, total]
        self.log_step(pl_module, values)

    @torch.no_grad()
    def _magnitudes(self) -> dict[str, Any]:
        """Mean |W| of pruned and kept weights, and the overlap of the kept ones with the first pick."""
        sums = []
        for name, picked in self._picks.last.items():
            size, kept = self.store.weights[name].detach().float().abs(), ~picked
            both = (kept & ~self._picks.first[name]).sum()
            sums.append(torch.stack([size.masked_fill(kept, 0).sum(), size.masked_fill(picked, 0).sum(), picked.sum(), kept.sum(), both]))
        pruned, kept, number_pruned, number_kept, both = torch.stack([one.to(sums[0].device) for one in sums]).double().sum(0).unbind()
        return {
            "magnitude_pruned": (pruned / number_pruned.clamp(min=1)).float(),
            "magnitude_kept": (kept / number_kept.clamp(min=1)).float(),
            "overlap": (both / number_kept.clamp(min=1)).float(),
        }

    @torch.no_grad()
    def _probe_switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The probe on the validation data, with pruned weights as they were just before and with 0 in their place."""
        spare, self._spare = self._spare, {}
        after = self._probe_mean(trainer, pl_module)
        if after is None:
            return
        for name, weight in spare.items():
            weight_now, mask = self.store.weights[name], self.store.masks[name]
            weight_now.copy_(torch.where(mask, weight_now, weight))
        before = self._probe_mean(trainer, pl_module)
        self.store.apply(spare)
        assert before is not None
        self._switch |= {"probe_before": before, "probe_after": after, "probe_drop": before - after}

    def _probe_mean(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        """Mean of the probe over the validation samples of all ranks; None where there are none."""
        assert self.probe is not None
        with isolate_rng(pl_module.device.type == "cuda"), trainer.precision_plugin.forward_context():
            measure = getattr(shadow(trainer, pl_module), self.probe)
            values = [measure(batch).detach().double().reshape(-1) for batch in validation_batches(trainer)]
        mine = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64, device=pl_module.device)
        everyone = distributed.gather_rows(mine, with_grad=False)
        return everyone.mean().float() if len(everyone) else None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log density, flips and what was measured at the switch."""
        moves = {"total_flips": self._flips.float()} if self.method in ("iss_p", "iht", "iss_r") else {}
        values: dict[str, Any] = {"density": self.store.density(), **moves, **self._switch}
        log_global(pl_module, {f"issp/{name}": value for name, value in values.items()}, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the switch has not come."""
        steps = max(self._steps, default=0)
        if steps < self._switch_at:
            early = f"after {steps} of prune_iters={self.prune_iters} steps, before the switch"
            rank_zero_warn(f"{type(self).__name__}: training ended {early}: the weights are dense")

    def dashboard_media(self) -> dict[str, Media]:
        """Table of the layers."""
        rows = []
        for name, weight in self.store.weights.items():
            size, picked = weight.detach().float().abs(), self._picks.last.get(name, ~self.store.masks[name])
            number = int(picked.sum())
            means = (float(size[picked].mean()) if number else None, float(size[~picked].mean()) if number < weight.numel() else None)
            norm, variance = self._gradient_stats[name].tolist() if name in self._gradient_stats else (None, None)
            rows.append((name, " x ".join(map(str, weight.shape)), number / weight.numel(), *means, norm, variance))
        columns = ("layer", "shape", "picked", "mean |W| picked", "mean |W| kept", "gradient norm", "gradient variance")
        return {"issp/layers": TableMedia(columns, tuple(rows))} if rows else {}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What all mask callbacks save, picks and the count of flips."""
        state = super().state_dict()
        return state and {**state, **self._picks.state(picked="last", first="first"), "flips": int(self._flips)}

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimisers and the schedulers."""
        super().leave(trainer, pl_module)
        detach(pl_module, self._hold, "lr_scheduler_step")
