"""Consistency between deformed clouds that trusts points by confidence and uncertainty, as a loss term (arXiv:2508.19909)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from lit_methods import checks
from lit_methods.callbacks.features import one_of_calls
from lit_methods.callbacks.lidar.sam3d_weak.core import (
    Deformation,
    consistency_loss_of_views,
    deformed_views,
    frozen_batch_norm,
    reliability_loss,
)
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.distributed import rank, world_size
from lit_methods.panels import Curve, Panel

Mode = Literal["reliability", "plain"]


def deformation_of(anchors: int, width: float, rotation: float, scale: float, shift: float) -> Deformation:
    """The arguments of a callback, checked."""
    checks.at_least(1, "places", anchors=anchors)
    checks.positive(width=width)
    checks.at_least(0, rotation=rotation, shift=shift)
    checks.at_least(1, "a stretch", scale=scale)
    return Deformation(anchors, width, rotation, scale, shift)


class Clouds(NamedTuple):
    """A call of a point network, taken apart.

    Attributes:
        points: (N, D), x, y, z first: all clouds, one after the other.
        points_per_sample: (B,) int64.
        again: Points (N, D) in the same order -> what the network returns for them.
        rows: What the network returned -> (N, C) logits.
    """

    points: Tensor
    points_per_sample: Tensor
    again: Callable[[Tensor], Any]
    rows: Callable[[Any], Tensor]


def clouds_of(network: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Clouds:
    """What a network of points was called with.

    Args:
        network: Gets points first: (N, D) with the sizes (B,) of the clouds second, or without for one cloud; or (B, N, D). It gives
            (N, C), (B, N, C) or (B, C, N).
        arguments: Positional ones of the call.
        keywords: The others.

    Raises:
        ValueError: It was called otherwise.
    """
    points = arguments[0] if arguments else next(iter(keywords.values()), None)
    if not isinstance(points, Tensor) or not points.is_floating_point() or points.ndim not in (2, 3) or points.shape[-1] < 3:
        got = f"{tuple(points.shape)} {points.dtype}" if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(
            f"the network's first argument is {got}: expected points (N, D) or (B, N, D) with x, y, z first; name the submodule that gets "
            "them with network="
        )
    first = next(iter(keywords)) if not arguments else None
    if points.ndim == 3:
        sizes = torch.full((len(points),), points.shape[1], device=points.device)
    else:
        rest = [*arguments[1:], *keywords.values()]
        found = [one for one in rest if isinstance(one, Tensor) and one.ndim == 1 and not one.is_floating_point()]
        sizes = found[0] if found else torch.tensor([len(points)], device=points.device)
        if found and len(sizes) == len(points) > 1:
            raise ValueError(f"the network gets {len(sizes)} integers for as many points: expected the size of each cloud, not its number")

    def again(moved: Tensor) -> Any:
        moved = moved.reshape(points.shape)
        return network(moved, *arguments[1:], **keywords) if first is None else network(**{**keywords, first: moved})

    def rows(logits: Any) -> Tensor:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if isinstance(logits, Tensor) and logits.ndim == points.ndim and logits.shape[:-1] == points.shape[:-1]:
            return logits.flatten(0, -2)
        if isinstance(logits, Tensor) and points.ndim == logits.ndim == 3 and logits.shape[::2] == points.shape[:2]:
            return logits.mT.flatten(0, 1)
        raise ValueError(f"the network gives {shape} for points {tuple(points.shape)}: expected a row of logits for each point")

    return Clouds(points.detach().flatten(0, -2), sizes, again, rows)


def cloud_logits(network: torch.nn.Module, points: Tensor, dense: bool = False) -> Tensor:
    """(N, C) logits of one cloud (N, D).

    Args:
        network: As in :func:`clouds_of`; whether it takes sizes is read from its ``forward``.
        points: Of the cloud.
        dense: It takes (B, N, D).
    """
    kinds = [one.kind for one in inspect.signature(network.forward).parameters.values()]
    places = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    arguments: tuple[Tensor, ...] = (points[None],) if dense else (points,)
    if not dense and (places > 1 or inspect.Parameter.VAR_POSITIONAL in kinds):
        arguments = (points, torch.tensor([len(points)], device=points.device))
    return clouds_of(network, arguments, {}).rows(network(*arguments))


class ReliabilityConsistency(LossTerm):
    """Lets deformed views of a cloud agree: by hard pseudo-labels where the network is sure of a point, by soft ones elsewhere.

    The points of a training step's clouds are deformed twice, and the two views mixed, each point with a share of its own. A point is
    reliable if the mean prediction of the original and the two views is at least ``tau`` and its deviation below ``kappa``. Reliable points
    learn the original's class in all three other views, the others its distribution in the two views:
    :func:`~lit_methods.callbacks.lidar.sam3d_weak.core.reliability_loss`. This is RAC-Net (arXiv:2303.05164), without masks.

    Runs: inside the training step. The network is run three times more, with the batch's statistics in batch norm, whose running means
    stay. Views follow from ``seed``, epoch, batch and rank; the global generators stay as they are.
    Saves: nothing.
    Refuses: submodules whose first argument isn't points (N, D) or (B, N, D), x, y, z first, or that don't give logits for each point.

    Args:
        network: Submodule that maps points, and the clouds' sizes, to logits of each point; patterns as in ``targets`` of other terms.
        weight: Factor of the term.
        mode: ``reliability``; ``plain``: soft consistency of all points, the baseline.
        tau: Smallest confidence of a reliable point.
        kappa: Reliable points have a smaller uncertainty.
        anchors: Places of a cloud that deform their surroundings.
        width: Standard deviation of their kernel; this and ``shift`` in shares of the cloud's radius.
        rotation: Largest angle about each axis, degrees.
        scale: Largest stretch, 1 or more.
        shift: Largest shift along each axis.
        checkpoint: Compute the views' activations anew in the backward pass instead of keeping them: less memory, more time.
        truth: Key of all labels in the batch, which are known in experiments: the accuracy of pseudo-labels is logged. Nothing learns
            from them. Batches without the key are fine.
        ignore_index: Label in ``truth`` of points that don't count.
        seed: Seed of the views.

    Raises:
        ValueError: A value lies outside its range.
    """

    name = "reliability"

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Consistency", ("reliability/loss", "reliability/reliable_loss", "reliability/ambiguous_loss"), goal="min"),
        Curve("Reliable points", ("reliability/share",), note="Share of all points of a batch."),
        Curve(
            "Accuracy of pseudo-labels",
            ("reliability/accuracy_reliable", "reliability/accuracy_ambiguous"),
            note="Where all labels are known: reliable points should be right far more often than the others.",
            goal="max",
        ),
    )

    def __init__(
        self,
        network: str = "network",
        weight: float = 1.0,
        mode: Mode = "reliability",
        tau: float = 0.7,
        kappa: float = 0.05,
        anchors: int = 4,
        width: float = 0.5,
        rotation: float = 10.0,
        scale: float = 3.0,
        shift: float = 0.25,
        checkpoint: bool = False,
        truth: str = "truth",
        ignore_index: int = 255,
        seed: int = 0,
    ) -> None:
        super().__init__([network], weight)
        checks.one_of(Mode, mode=mode)
        checks.share(tau=tau)
        checks.positive(kappa=kappa)
        checks.at_least(0, seed=seed)
        self.network, self.mode, self.tau, self.kappa = network, mode, tau, kappa
        self.deformation = deformation_of(anchors, width, rotation, scale, shift)
        self.checkpoint, self.truth, self.ignore_index, self.seed = checkpoint, truth, ignore_index, seed

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the views."""
        name = one_of_calls(inputs["features"], self.network, "network")
        network = inputs["module"].get_submodule(name)
        clouds = clouds_of(network, *inputs["feature_arguments"][name][-1])
        logits = clouds.rows(inputs["features"][name])
        place = f"ReliabilityConsistency {inputs['epoch']} {inputs['batch_idx'] * world_size() + rank()}"
        positions = clouds.points[:, :3]
        views = deformed_views(positions, clouds.points_per_sample, place, self.seed, self.deformation)

        def run(moved: Tensor) -> Tensor:
            with frozen_batch_norm(network):
                return clouds.rows(clouds.again(torch.cat([moved, clouds.points[:, 3:]], dim=1)))

        def view(moved: Tensor) -> Tensor:
            again = (lambda x: checkpointed(run, x, use_reentrant=False)) if self.checkpoint else run
            return self.run_again(moved, again).output  # type: ignore[no-any-return]

        first, second = view(views.first), view(views.second)
        if self.mode == "plain":
            return consistency_loss_of_views(logits, first, second), {}
        found = reliability_loss(logits, first, second, view(views.mixture), self.tau, self.kappa)
        about = found.reliability
        logs = {"reliable_loss": found.reliable, "ambiguous_loss": found.ambiguous, "share": about.selected.float().mean()}
        truth = inputs["batch"].get(self.truth) if isinstance(inputs["batch"], dict) else None
        if truth is not None:
            known, right = (truth != self.ignore_index).flatten(), about.pseudo_labels == truth.flatten()
            for key, chosen in (("reliable", about.selected & known), ("ambiguous", ~about.selected & known)):
                logs[f"accuracy_{key}"] = (right & chosen).sum() / chosen.sum().clamp(min=1)
        return found.total, logs


__all__ = ["Clouds", "ReliabilityConsistency", "cloud_logits", "clouds_of", "deformation_of"]
