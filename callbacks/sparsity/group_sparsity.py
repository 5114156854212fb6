"""Group lasso: groups of weights that go to exactly 0 together, by a proximal step behind the optimiser's.

Source: oi-VAE (arXiv:1802.06765), section 3.3, and samuela/oi-vae@60922cf (lib/models.py, BayesianGroupLassoGenerator).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.sparsity.callback import SparsityCallback
from lit_methods.callbacks.sparsity.store import choose_weights, listed, trained
from lit_methods.callbacks.targets import refuse_sharded
from lit_methods.callbacks.wrapping import built_by
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import logs_now

Mode = Literal["proximal", "penalty"]
_SMALLEST = 1e-16  # of a norm that is divided by


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def group_norms(weight: Tensor, over: Sequence[int] = (0,)) -> Tensor:
    """Euclidean norm of each group of weights.

    Args:
        weight: Any shape, floating point.
        over: Dimensions that a group runs along; there is a group for each place in the others. Of a linear layer's (out, in) weight,
            ``(0,)`` makes a group of each input, ``(1,)`` of each output.

    Returns:
        The shape that is left without these dimensions, float32 or wider. The gradient at a group of zeros is 0.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.vector_norm(wide, dim=tuple(over))


def group_penalty(weight: Tensor, over: Sequence[int] = (0,)) -> Tensor:
    """The group lasso: sum of the norms of all groups, as in :func:`group_norms`."""
    return group_norms(weight, over).sum()


def group_shrink(weight: Tensor, threshold: Tensor | float, over: Sequence[int] = (0,)) -> Tensor:
    """Proximal step of the group lasso: W / |W| * max(|W| - threshold, 0) of each group.

    Args:
        weight: Any shape, floating point.
        threshold: Step size times weight of the penalty, >= 0.
        over: Dimensions that a group runs along, as in :func:`group_norms`.

    Returns:
        The shape and dtype of ``weight``; groups with a norm up to the threshold are exactly 0.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=tuple(over), keepdim=True)
    return (wide / norms.clamp(min=_SMALLEST) * (norms - threshold).clamp(min=0)).to(weight.dtype)


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class GroupSparsity(SparsityCallback):
    """Adds the group lasso to any training: weight times the sum of the norms of groups of weights, which sets whole groups to exactly 0.

    In mode ``proximal`` the penalty isn't differentiated: behind each step of an optimiser, each group is shrunk towards 0 by step size
    times ``weight``, and stays at 0 if its norm is smaller. A group may come back when its gradient is large enough. In mode ``penalty``
    the penalty's gradient joins the others', which never gives exact zeros.

    Runs: on the weights that ``targets`` choose, in a hook of the optimisers themselves, so that accumulation, manual optimisation and AMP
    need nothing special. The gradient of ``penalty`` is added once per step, to gradients that are summed over micro-batches, averaged over
    ranks and unscaled, before clipping; with several optimisers, where each holds its weights. Losses that are logged don't contain the
    penalty. Averaged copies (``EMATeacher``) follow the weights, and reach 0 in the limit.

    Several may be used together, on different weights; the second logs as ``group_sparsity_2``.

    Saves: nothing; what it does follows from weights and optimiser.

    Refuses: strategies that shard weights, targets that match nothing, aren't trained or lack a dimension of ``over``, and modules without
    a chosen weight.

    Args:
        targets: ``fnmatch`` patterns on submodule names; empty: every linear, convolution and attention module.
        skip: Patterns on submodule names that stay as they are.
        weight: Lambda, the factor of the penalty, >= 0; 0: it only measures.
        over: Dimensions of a weight that a group runs along: ``[0]`` makes a group of each input of a linear layer, ``[1]`` of each output,
            ``[1, 2, 3]`` of each filter of a convolution.
        mode: ``proximal`` or ``penalty``.
        step_size: Of the proximal step; None: the learning rate that the optimiser's step had. Adam moves weights by about its learning
            rate whatever the gradient, so under Adam it is a setting of its own.

    Raises:
        ValueError: An argument outside its range; in ``setup``, weights that don't fit.
    """

    prefix = "group_sparsity"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Groups that are exactly 0", ("group_sparsity/zero_groups",), note="Share of all groups of the chosen weights."),
        Curve("Sum of the groups' norms", ("group_sparsity/penalty",)),
        TablePanel("Groups per weight", "group_sparsity/weights"),
    )

    def __init__(
        self,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        weight: float = 1e-3,
        over: Sequence[int] = (0,),
        mode: Mode = "proximal",
        step_size: float | None = None,
    ) -> None:
        super().__init__(targets, skip)
        checks.literals(GroupSparsity, locals())
        checks.at_least(0, weight=weight, step_size=step_size)
        if not over or len(set(over)) != len(over):
            raise ValueError(f"over is {list(over)}: give the dimensions that a group runs along, each once, such as [0]")
        self.weight, self.over, self.mode, self.step_size = weight, tuple(over), mode, step_size
        self.weights: dict[str, nn.Parameter] = {}
        self._name = self.prefix  # before the names of figures: with _2 and so on where there are several
        self._handles: list[Any] = []

    def _choose(self, pl_module: nn.Module, held: set[int] | None = None) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        with checks.naming(type(self).__name__):
            choice = trained(type(self).__name__, choose_weights(pl_module, list(self.targets), self.skip), list(self.targets), held)
            for name, weight in choice.weights.items():
                outside = [dim for dim in self.over if not -weight.ndim <= dim < weight.ndim]
                if outside or len({dim % weight.ndim for dim in self.over}) != len(self.over):
                    raise ValueError(f"over={list(self.over)} names no dimensions of {name} {tuple(weight.shape)}: give others, or skip it")
        return choice.weights, choice.left

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights, and refuse what can't work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_sharded(trainer, type(self).__name__)
            alike = [callback for callback in trainer.callbacks if type(callback) is type(self)]  # type: ignore[attr-defined]
            place = next(number for number, callback in enumerate(alike, start=1) if callback is self)
            self._name = self.prefix if place == 1 else f"{self.prefix}_{place}"
            if built_by(pl_module) is None:
                self._choose(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the optimisers."""
        held = {id(parameter) for optimizer in trainer.optimizers for group in optimizer.param_groups for parameter in group["params"]}
        self.weights, left = self._choose(pl_module, held)
        if left:
            rank_zero_warn(f"{type(self).__name__} leaves out weights that aren't trained: {listed(left)}")
        if self.mode == "proximal" and self.weight > 0:
            self._handles = [optimizer.register_step_post_hook(self._stepped) for optimizer in trainer.optimizers]

    def _own(self, optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, Any]]:
        """The chosen weights that an optimiser holds, with their learning rates."""
        chosen = {id(weight) for weight in self.weights.values()}
        return [(weight, group["lr"]) for group in optimizer.param_groups for weight in group["params"] if id(weight) in chosen]

    @torch.no_grad()
    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight, learning_rate in self._own(optimizer):
            step_size = learning_rate if self.step_size is None else self.step_size
            weight.copy_(group_shrink(weight, step_size * self.weight, self.over))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """In mode ``penalty``: add its gradient."""
        if self.mode == "proximal" or not self.weight:
            return
        for weight, _ in self._own(optimizer):
            if weight.grad is not None:
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(group_penalty(weight, self.over), weight)
                weight.grad.add_(gradient, alpha=self.weight)

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Name of each chosen weight -> norms of its groups; {} before fit."""
        return {name: group_norms(weight, self.over) for name, weight in self.weights.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the share of zero groups and the penalty."""
        if logs_now(pl_module):
            norms = torch.cat([norm.flatten() for norm in self.norms().values()])
            figures = {"zero_groups": (norms == 0).float().mean(), "penalty": norms.sum()}
            pl_module.log_dict({f"{self._name}/{name}": value for name, value in figures.items()}, on_epoch=False, batch_size=1)

    def dashboard_media(self) -> dict[str, Media]:
        """Table of the weights."""
        rows = [
            (name, " x ".join(map(str, self.weights[name].shape)), norm.numel(), int((norm == 0).sum()), float(norm.mean()))
            for name, norm in self.norms().items()
        ]
        heading = ("weight", "shape", "groups", "exactly 0", "mean norm")
        return {f"{self._name}/weights": TableMedia(heading, tuple(rows))} if rows else {}

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimisers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


__all__ = ["GroupSparsity", "group_norms", "group_penalty", "group_shrink"]
