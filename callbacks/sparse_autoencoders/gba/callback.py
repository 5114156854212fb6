"""Group bias adaptation as a callback: the biases of an autoencoder follow how often its neurons fire.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparse_autoencoders.gba.core`.
"""

import difflib
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.features import FeatureCallback, one_of_calls
from lit_methods.callbacks.sparse_autoencoders.gba.core import (
    BiasUpdate,
    bias_update,
    firing_statistics,
    neuron_groups,
    target_frequencies,
)
from lit_methods.callbacks.targets import plain_modules, refuse_sharded
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows, rank, sum_over_ranks
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel, TableMedia, TablePanel

TECHNIQUE = Technique(
    slug="gba",
    short="GBA",
    title="Taming Polysemanticity in LLMs: Provable Feature Recovery via Sparse Autoencoders",
    arxiv="2506.14002",
    family="sparse_autoencoders",
    form="callback",
    classes=("lit_methods.callbacks.GroupBiasAdaptation",),
    configs=("gba.yaml",),
    golden=("bias_update", "sae_step", "recovery_metrics"),
    claim="An autoencoder whose neurons may fire as often as a feature occurs recovers more features than one whose neurons may fire a "
    "sixteenth as often.",
    summary="Sets the sparsity of an autoencoder by feedback on each neuron's bias, with a target frequency for each group of neurons.",
)


class GroupBiasAdaptation(FeatureCallback):
    """Lowers the bias of neurons that fire more often than their group may, and raises that of dead ones: no penalty, no k.

    The M neurons are dealt to K groups with geometric targets ``htf`` = p_1 > ... > p_K = ``ltf``. Every so many steps, with the frequency
    p_m and the peak r_m = max(max y_m, 0) of each pre-activation y_m (bias included) since the last time, and T_k the mean positive peak of
    group k::

        p_m > p_k:           b_m <- max(b_m - gamma_minus * r_m, -1)
        else p_m < epsilon:  b_m <- min(b_m + gamma_plus * T_k, 0)

    It works on any module that has the pre-activations as the output of a submodule and the bias as a buffer::

        callbacks+:
          - class_path: GroupBiasAdaptation
            init_args: {pre_activations: encoder, bias: threshold, includes_bias: false}

    Runs: adds up what fires at the end of each training batch (a few figures per neuron, in float32, never the pre-activations themselves),
    over all rows of whatever shape; moves the bias, in place, every ``every_n_steps`` optimiser steps, from the figures of all ranks.
    Saves: these figures, summed over the ranks. The bias lies in the module's own checkpoint.
    Refuses: a bias that an optimiser holds, that isn't saved with the module, or that doesn't fit the pre-activations; sharded weights.

    Args:
        groups: K; 1 is bias adaptation (BA) without groups, whose target is ``htf``.
        htf: Highest target frequency, a share of the samples.
        ltf: Lowest target frequency. A dead neuron of the last group is only noticed with many more than 1 / ``ltf`` samples between two
            updates.
        gamma_plus: Step of raising the bias of dead neurons.
        gamma_minus: Step of lowering the bias of those that fire too often.
        epsilon: A neuron that fires more rarely is dead.
        every_n_steps: Optimiser steps between two updates.
        pre_activations: Name or ``fnmatch`` pattern of the submodule that puts out the pre-activations, (..., M).
        bias: Name of the buffer (M,) that holds the biases.
        includes_bias: The submodule's output has the bias in it; False: it is added here.

    Raises:
        ValueError: An argument outside its range.
    """

    runs_before: ClassVar[Sequence[str]] = ("Dashboard",)

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Neurons above their target, and dead ones",
            ("gba/above_target", "gba/dead"),
            note="Shares. Targets are upper bounds: what lies between is left alone.",
        ),
        Curve("Mean bias", ("gba/bias",), note="From 0 down, until the frequencies are below the targets; never below -1."),
        Curve("Mean frequency", ("gba/frequency",), note="Share of the samples in which a neuron fires."),
        Curve("Groups without a positive peak", ("gba/silent_groups",), note="Their neurons can't come back: lower gamma_minus."),
        HistogramPanel("Frequencies, as powers of ten", "gba/frequencies", note="Dead neurons stand at the left end."),
        HistogramPanel("Biases", "gba/biases"),
        TablePanel("Groups", "gba/groups", note="Since the last update."),
    )

    def __init__(
        self,
        groups: int = 10,
        htf: float = 0.5,
        ltf: float = 1e-3,
        gamma_plus: float = 0.01,
        gamma_minus: float = 0.01,
        epsilon: float = 1e-6,
        every_n_steps: int = 50,
        pre_activations: str = "pre_activation",
        bias: str = "encoder_bias",
        includes_bias: bool = True,
    ) -> None:
        super().__init__([pre_activations])
        checks.at_least(0, gamma_plus=gamma_plus, gamma_minus=gamma_minus)
        checks.within("[0, 1)", "a share of the samples", epsilon=epsilon)
        checks.at_least(1, "optimiser steps", every_n_steps=every_n_steps)
        target_frequencies(groups, htf, htf if groups == 1 else ltf)  # checks their ranges
        self.groups, self.htf, self.ltf, self.gamma_plus, self.gamma_minus = groups, htf, ltf, gamma_plus, gamma_minus
        self.epsilon, self.every_n_steps = epsilon, every_n_steps
        self.pre_activations, self.bias, self.includes_bias = pre_activations, bias, includes_bias
        self._loaded: dict[str, Any] | None = None
        self._home: tuple[nn.Module, str] | None = None
        self._reset()

    @property
    def _bias(self) -> Tensor:
        """The biases, as the module holds them now: a module may move to another device, or set its buffer anew."""
        assert self._home is not None
        part, name = self._home
        bias: Tensor = getattr(part, name)
        return bias

    def _reset(self) -> None:
        self._group = self._target = torch.zeros(0)
        self._firing, self._peak = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        self._samples = 0
        self._last_step = 0  # optimiser step of the last update
        self._found: BiasUpdate | None = None  # by the last update
        self._logs: dict[str, Tensor] = {}

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            ValueError: The strategy shards weights; the submodule or the buffer isn't there.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_sharded(trainer, "GroupBiasAdaptation")

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Hook into the module, if it has the bias.

        Raises:
            ValueError: There is no such submodule, or no such vector in the module's state.
        """
        super().hook_in(pl_module)
        with checks.naming("GroupBiasAdaptation"):
            one_of_calls(self._capture.calls, self.pre_activations, "pre_activations")
            self._home = _home(pl_module, self.bias)
            neuron_groups(len(self._bias), self.groups)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count, or go on.

        Raises:
            ValueError: An optimiser holds the bias, or the checkpoint's figures are of another width.
        """
        bias = self._bias
        if any(parameter is bias for optimizer in trainer.optimizers for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"GroupBiasAdaptation: an optimiser holds bias={self.bias!r}, and would move it, too: make it a buffer, or leave it out of "
                "configure_optimizers"
            )
        self._reset()
        self._last_step = trainer.global_step
        self._group = neuron_groups(len(bias), self.groups).to(bias.device)
        self._forget()
        self._target = target_frequencies(self.groups, self.htf, self.htf if self.groups == 1 else self.ltf).to(self._peak)
        self._take_over()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with what a tuner has put back since."""
        self._take_over()

    def _take_over(self) -> None:
        """Go on with the figures of a checkpoint, if there are any."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or not len(loaded["firing"]):
            return
        if len(loaded["firing"]) != len(self._bias):
            raise ValueError(
                f"GroupBiasAdaptation: the checkpoint counts {len(loaded['firing'])} neurons, and bias={self.bias!r} has "
                f"{len(self._bias)}: resume with the same module"
            )
        self._forget()
        self._last_step = int(loaded["last_step"])
        if rank() == 0:  # the figures of all ranks are rank 0's from now on
            self._firing.copy_(loaded["firing"])
            self._peak.copy_(loaded["peak"])
            self._samples = int(loaded["samples"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count what fires, and move the bias when its time has come."""
        with checks.naming("GroupBiasAdaptation"), torch.no_grad():
            for calls in self._capture.calls.values():
                for y in calls:
                    self._count(y)
            if trainer.global_step - self._last_step >= self.every_n_steps:
                self._last_step = trainer.global_step
                self._update()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._logs:
            pl_module.log_dict(self._logs, batch_size=1)  # figures of all ranks, the same on each

    # ---- the feedback ------------------------------------------------------------------------------------------------------------------

    def _count(self, y: Any) -> None:
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.shape[-1:] != self._bias.shape:
            given = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"pre_activations={self.pre_activations!r} puts out {given}, and bias={self.bias!r} is {tuple(self._bias.shape)}: name the "
                f"submodule whose output is (..., {len(self._bias)}) pre-activations"
            )
        y = y.detach().reshape(-1, y.shape[-1])
        if not self.includes_bias:
            y = y + self._bias
        firing, peak = firing_statistics(y)
        self._firing += firing
        torch.maximum(self._peak, peak.to(self._peak.dtype), out=self._peak)
        self._samples += len(y)

    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The figures of all ranks."""
        samples = sum_over_ranks(torch.tensor(self._samples, device=self._firing.device))
        return sum_over_ranks(self._firing), gather_rows(self._peak[None], with_grad=False).amax(0), samples

    def _update(self) -> None:
        firing, peak, samples = self._summed()
        if not int(samples):
            raise ValueError(
                f"pre_activations={self.pre_activations!r} put out nothing in {self.every_n_steps} optimiser steps: name a submodule that "
                "runs in training_step"
            )
        settings = self.gamma_plus, self.gamma_minus, self.epsilon
        found = self._found = bias_update(self._bias, firing, peak, samples, self._group, self._target, *settings)
        self._bias.copy_(found.bias)
        self._forget()
        self._logs = {
            "gba/above_target": found.lowered.float().mean(),
            "gba/dead": found.raised.float().mean(),
            "gba/bias": found.bias.to(found.frequency.dtype).mean(),
            "gba/frequency": found.frequency.mean(),
            "gba/silent_groups": (found.group_peak == 0).float().sum(),
        }

    def _forget(self) -> None:
        neurons, device = len(self._bias), self._bias.device
        self._firing = torch.zeros(neurons, dtype=torch.int64, device=device)
        self._peak = torch.zeros(neurons, dtype=torch.promote_types(self._bias.dtype, torch.float32), device=device)
        self._samples = 0

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks off the module."""
        super().leave(trainer, pl_module)
        self._home = self._loaded = None

    # ---- what is shown and kept --------------------------------------------------------------------------------------------------------

    def dashboard_media(self) -> dict[str, Media]:
        """Frequencies, biases and groups, as the last update found them."""
        if self._found is None:
            return {}
        found = self._found
        frequency, bias, group = (x.float().cpu().numpy() for x in (found.frequency, found.bias, self._group))
        floor = min(self.ltf, self.htf) / 100
        powers = np.histogram(np.log10(np.clip(frequency, floor, 1)), bins=40, range=(float(np.log10(floor)), 0.0))
        rows = []
        for number, target in enumerate(self._target.tolist()):
            own = group == number
            dead = float((frequency[own] < self.epsilon).mean())
            rows.append((number, target, int(own.sum()), float(np.median(frequency[own])), float(frequency[own].max()), dead))
        return {
            "gba/frequencies": HistogramMedia(*powers),
            "gba/biases": HistogramMedia(*np.histogram(bias, bins=40, range=(-1.0, 0.0))),
            "gba/groups": TableMedia(("group", "target", "neurons", "median frequency", "largest frequency", "dead"), tuple(rows)),
        }

    def state_dict(self) -> dict[str, Any]:
        """What fired since the last update; only rank 0's checkpoint is written, so it holds the figures of all ranks."""
        firing, peak, samples = self._summed()
        return {"firing": firing.clone(), "peak": peak.clone(), "samples": int(samples), "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it when fit starts."""
        self._loaded = state_dict


def _home(pl_module: pl.LightningModule, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the vector ``name``, and the vector's name in it.

    Raises:
        ValueError: There is no such buffer or parameter, it is no vector, or it isn't saved with the module.
    """
    homes = {}
    for owner, part in plain_modules(pl_module).items():
        saved = {
            **part._parameters,
            **{key: buffer for key, buffer in part._buffers.items() if key not in part._non_persistent_buffers_set},
        }
        for key, value in saved.items():
            if value is not None and value.ndim == 1 and value.is_floating_point():
                homes[f"{owner}.{key}" if owner else key] = part, key
    if name not in homes:
        raise ValueError(
            f"bias={name!r} is no vector in the state of {type(pl_module).__name__}: name a buffer with one entry per neuron, which its "
            f"checkpoints hold; the nearest vectors are {', '.join(difflib.get_close_matches(name, homes, n=6, cutoff=0.0)) or 'none'}"
        )
    return homes[name]


__all__ = ["GroupBiasAdaptation"]
