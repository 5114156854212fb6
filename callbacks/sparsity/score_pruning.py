"""Pruning by learned scores as a callback: weights are trained, then scores, then the weights that stay.

Maths and origin: :mod:`lit_methods.callbacks.sparsity.score_masks`. This is HYDRA's procedure (arXiv:2002.10509) with its usual loss, which
DASS (arXiv:2207.06968) uses for the networks that it finds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.callbacks.sparsity.callback import notify_mask_updated
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.history import MaskHistory, flips
from lit_methods.callbacks.sparsity.latent import LatentCallback, LatentWeight, ParametrizedWeight, Place, Shared
from lit_methods.callbacks.sparsity.score_masks import Phase, pruning_phase, scaled_scores, score_mask, scored_weight
from lit_methods.optim import warmup_cosine
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global, logs_now, training_length

_PHASES: tuple[Phase, ...] = ("pretrain", "prune", "finetune")


class _Course(Shared):
    """What all layers share: phase and keep ratio."""

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.phase: Phase = "pretrain"


class _Fixed(Shared):
    """A layer's mask while the weights that stay are trained; copies of the module follow it."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None


class ScoredForward(LatentWeight):
    """Parametrisation: latent weight -> weight with the mask of its scores.

    Args:
        weight: The latent weight, whose shape and dtype the scores have.
        course: Phase and keep ratio.
        generator: Draws the first scores.
    """

    def __init__(self, weight: Tensor, course: _Course, generator: torch.Generator) -> None:
        super().__init__()
        self.course, self.fixed = course, _Fixed()
        drawn = torch.empty(weight.shape, dtype=weight.dtype)
        nn.init.kaiming_normal_(drawn, generator=generator)
        self.scores = nn.Parameter(drawn.to(weight.device))

    def neutral_state(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Scores by which the largest weights stay: all of a sparse weight."""
        return {"scores": scaled_scores(weight)}

    def mask(self) -> Tensor:
        """bool, what the forward pass sees now."""
        if self.course.phase == "pretrain":
            return torch.ones_like(self.scores, dtype=torch.bool)
        if self.course.phase == "prune" or self.fixed.mask is None:
            return score_mask(self.scores, self.course.keep)
        if self.fixed.mask.device != self.scores.device:
            self.fixed.mask = self.fixed.mask.to(self.scores.device)
        return self.fixed.mask

    def forward(self, weight: Tensor) -> Tensor:
        """Latent weight -> weight of the forward pass. With several processes scores always have a gradient, as DDP waits for one."""
        if self.course.phase == "pretrain" and distributed.world_size() == 1:
            return weight
        return scored_weight(weight, self.scores, self.mask())


class _Layer(ParametrizedWeight[ScoredForward]):
    @property
    def scores(self) -> nn.Parameter:
        return self.parametrization.scores


class ScorePruning(LatentCallback):
    """Prunes chosen weights of any module by scores that are learned for it.

    In each layer the share ``keep`` of the weights stays, those of the largest |S|, and the forward pass sees W * M. Training has three
    phases: ``pretrain`` (W is trained, nothing is pruned), ``prune`` (scores alone are trained, by g W sign(S), which reaches removed
    weights too; everything else of the module rests) and ``finetune`` (the mask stays as it is, everything but the scores is trained).
    With ``prune_steps`` 0 and scaled scores this is pruning by magnitude.

    Runs: as :class:`LatentCallback`; without ``targets`` every linear, convolution and attention module, the first and the last, too. The
    phase follows from ``trainer.global_step``, so with several optimisers every one's steps count. What rests has no gradient when its
    optimiser steps: no momentum and no decay moves it; buffers such as running means go on. Each phase begins with an empty memory of the
    optimisers. Scores are trained by the optimiser and in the group of their weight. A training that ends before ``finetune`` ends sparse
    all the same, by the mask of that moment.

    Saves: what :class:`LatentCallback` saves, scores, and the phase.

    Refuses: what :class:`LatentCallback` refuses; layers of which ``keep`` leaves nothing; a ``finetune_learning_rate`` in a training
    without an end.

    Args:
        keep: Share of each layer's weights that stays, in (0, 1].
        targets: ``fnmatch`` patterns on submodule names; empty: every linear, convolution and attention module.
        skip: Patterns on submodule names that stay dense.
        pretrain_steps: Optimiser steps of the first phase.
        prune_steps: Optimiser steps of the second phase; the third has the rest.
        scores: What scores begin with in the second phase: ``scaled`` from the weights, or ``random`` (Kaiming).
        prune_learning_rate: Learning rate of the second phase, falling to 0 along half a cosine; None: the module's own.
        finetune_learning_rate: The same of the third phase.
        seed: Of random scores.

    Raises:
        ValueError: An argument outside its range.
    """

    prefix = "score_pruning"
    kept: ClassVar[Mapping[str, str]] = {"phase": "_phase"}
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Phase and density", ("score_pruning/phase", "score_pruning/density"), note="Phase 0: all weights; 1: scores; 2: the rest."),
        Curve("Learning rate of the phase", ("score_pruning/learning_rate",)),
        Curve(
            "Learned masks",
            ("score_pruning/magnitude_overlap", "score_pruning/mask_flip_rate"),
            note="Share of the kept weights that magnitude would keep too; share of the mask that changed since the last epoch.",
        ),
        TablePanel("Pruned layers", "score_pruning/layers"),
    )

    def __init__(
        self,
        keep: float = 0.1,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        pretrain_steps: int = 0,
        prune_steps: int = 200,
        scores: Literal["scaled", "random"] = "scaled",
        prune_learning_rate: float | None = None,
        finetune_learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(targets, skip)
        checks.literals(ScorePruning, locals())
        checks.within("(0, 1]", "the share of the weights that stays", keep=keep)
        checks.at_least(0, "optimiser steps", pretrain_steps=pretrain_steps, prune_steps=prune_steps)
        checks.positive(prune_learning_rate=prune_learning_rate, finetune_learning_rate=finetune_learning_rate)
        checks.at_least(0, "a whole number", seed=seed)
        self.keep, self.pretrain_steps, self.prune_steps, self.scores, self.seed = keep, pretrain_steps, prune_steps, scores, seed
        self.prune_learning_rate, self.finetune_learning_rate = prune_learning_rate, finetune_learning_rate

    def reset(self) -> None:
        """Forget the last run."""
        super().reset()
        self._layers: dict[str, _Layer] = {}
        self._course: _Course | None = None
        self._phase: str = "pretrain"
        self._history = MaskHistory("last")
        self._handles: list[Any] = []
        self._ends = 0  # step at which the training ends, where that matters
        self._final: dict[str, Tensor] = {}

    @property
    def density(self) -> float:
        """Share of the chosen weights that stays in the end."""
        return self.keep

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        return SparsityCard(
            stage="during",
            regime="dense_to_sparse",
            mask="dynamic" if self.prune_steps else "static",
            forward_dense=self.pretrain_steps > 0,
            backward_dense=True,
            optimizer_dense=True,
            criterion="learned" if self.prune_steps else "magnitude",
            cost="ste",
        )

    # ---- the weights -------------------------------------------------------------------------------------------------------------------

    def chosen(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """Name of each weight -> the weight."""
        return self.trained(pl_module, list(self.targets)).weights

    def make_layers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Mapping[str, Any], places: Mapping[str, Place]
    ) -> dict[str, _Layer]:
        """Weights with scores of their own."""
        course = self._course = _Course(self.keep)
        generator = torch.Generator().manual_seed(own_seed("ScorePruning", self.seed))
        layers = {}
        for name in chosen:
            place = places[name]
            size = place.weight.numel()
            if int((1 - self.keep) * size) >= size:
                raise ValueError(f"ScorePruning, {name}: keep={self.keep} of {size} weights leaves none: raise keep, or skip the layer")
            layers[name] = _Layer(place.module, place.attribute, ScoredForward(place.weight, course, generator))
        return layers

    def title(self) -> str:
        """What stays."""
        return f"ScorePruning (keeps {self.keep:.3g} of each layer)"

    # ---- the phases --------------------------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        """Begin a phase. From ``pretrain`` on, scores are made of the weights; in ``finetune`` the masks are fixed."""
        assert self._course is not None
        before, self._course.phase, self._phase = self._course.phase, phase, phase
        with torch.no_grad():
            for layer in self._layers.values():
                if before == "pretrain" and phase != "pretrain" and self.scores == "scaled":
                    layer.scores.copy_(scaled_scores(layer.latent))
                layer.parametrization.fixed.mask = score_mask(layer.scores, self.keep) if phase == "finetune" else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the optimisers.

        Raises:
            ValueError: No optimiser holds one of the weights, or the training has no end and the learning rate needs one.
        """
        super().on_fit_start(trainer, pl_module)
        if self.finetune_learning_rate is not None:
            self._ends = training_length(pl_module, what="ScorePruning's finetune_learning_rate", instead=None)
        for optimizer in trainer.optimizers:
            own: list[float] = []
            self._handles += [
                optimizer.register_step_pre_hook(lambda optimizer, *_, own=own: self._set_rate(trainer, optimizer, own)),
                optimizer.register_step_post_hook(lambda optimizer, *_, own=own: self._give_back(optimizer, own)),
            ]

    def _rate(self, step: int) -> float | None:
        """Learning rate of a phase that has its own."""
        phase, done = pruning_phase(step, self.pretrain_steps, self.prune_steps)
        if phase == "prune" and self.prune_learning_rate is not None:
            return self.prune_learning_rate * warmup_cosine(done, self.prune_steps)
        if phase == "finetune" and self.finetune_learning_rate is not None:
            return self.finetune_learning_rate * warmup_cosine(done, max(1, self._ends - self.pretrain_steps - self.prune_steps))
        return None

    def _set_rate(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, own: list[float]) -> None:
        """Before a step: the phase's learning rate. The module's own is put back behind it, as its schedulers may go on from there."""
        rate = self._rate(trainer.global_step)
        own[:] = [group["lr"] for group in optimizer.param_groups] if rate is not None else []
        for group in optimizer.param_groups if rate is not None else ():
            group["lr"] = rate

    def _give_back(self, optimizer: torch.optim.Optimizer, own: list[float]) -> None:
        for group, rate in zip(optimizer.param_groups, own, strict=False):
            group["lr"] = rate

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter the phase of this step, with an empty memory of the optimisers if it is another one."""
        phase, _ = pruning_phase(trainer.global_step, self.pretrain_steps, self.prune_steps)
        if phase != self._phase:
            self._enter(phase)
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
            notify_mask_updated(trainer, pl_module, self)
        if logs_now(pl_module):
            rate = self._rate(trainer.global_step)
            own = trainer.optimizers[0].param_groups[0]["lr"]
            logs = {"phase": float(_PHASES.index(phase)), "density": self._kept(), "learning_rate": own if rate is None else rate}
            self.log_step(pl_module, logs)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of what rests, before clipping."""
        scores = {id(layer.scores) for layer in self._layers.values()}
        learns = self._phase == "prune"
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (id(parameter) in scores) != learns:
                    parameter.grad = None

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the masks, if training ends before its last phase."""
        if self._layers and self._phase != "finetune":
            self._enter("finetune")
            notify_mask_updated(trainer, pl_module, self)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what costs a pass over the weights, and tell the others about the masks."""
        if self._phase == "pretrain":
            return
        masks = self.sparsity_masks()
        kept = torch.stack([mask.sum() for mask in masks.values()]).sum()
        both = [masks[name] & score_mask(layer.latent, self.keep) for name, layer in self._layers.items()]
        logs = {"magnitude_overlap": torch.stack([mask.sum() for mask in both]).sum() / kept}
        if shared := sum(mask.numel() for name, mask in masks.items() if name in self._history.last):
            logs["mask_flip_rate"] = torch.as_tensor(float(flips(self._history.last, masks)) / shared)
        self._history.last = masks
        log_global(pl_module, {f"score_pruning/{name}": value for name, value in logs.items()}, batch_size=1)
        notify_mask_updated(trainer, pl_module, self)

    def _kept(self) -> float:
        """Share of the chosen weights in the forward pass now, without a look at the masks."""
        if self._phase == "pretrain":
            return 1.0
        sizes = [layer.latent.numel() for layer in self._layers.values()]
        return sum(size - int((1 - self.keep) * size) for size in sizes) / sum(sizes)

    # ---- what others ask for -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sparsity_masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of the forward pass."""
        return {name: layer.parametrization.mask() for name, layer in self._layers.items()} if self._layers else dict(self._final)

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The masks."""
        masks = self.sparsity_masks()
        return {"score_pruning_masks": masks} if masks else {}

    def dashboard_media(self) -> dict[str, Media]:
        """A table of the pruned layers."""
        counts = {name: (int(mask.sum()), mask.numel()) for name, mask in self.sparsity_masks().items()}
        rows = tuple((name, count, total, count / total) for name, (count, total) in counts.items())
        return {"score_pruning/layers": TableMedia(("weight", "kept", "of", "share"), rows)} if rows else {}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Name of each weight -> latent weight and scores."""
        return {name: {key: value.detach() for key, value in layer.parts().items()} for name, layer in self._layers.items()}

    def state(self) -> dict[str, Any]:
        """Latent weights, scores, the phase, and the masks of the last epoch."""
        return super().state() | self._history.state(previous="last")

    def restore(self, state: dict[str, Any]) -> None:
        """Go on in the phase of the checkpoint."""
        assert self._course is not None
        self._history.load(state, {name: layer.latent for name, layer in self._layers.items()}, previous="last")
        self._course.phase = "finetune"  # scores are those of the checkpoint, not new ones
        self._enter(state["phase"])

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary module with pruned weights; masks stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._layers:
            self._final = self.sparsity_masks()
        super().leave(trainer, pl_module)


__all__ = ["ScorePruning", "ScoredForward"]
