"""The consistency of masks between a clip and its mirror image (arXiv:2203.04251), for any module that puts out masks of clips.

The maths is :func:`lit_methods.video.video_action_detection.core.mask_consistency`; the whole method, with labels and figures, is
``SemiSupervisedVideoDetector``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.features import one_submodule
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.checks import naming
from lit_methods.panels import Curve, Panel
from lit_methods.video.ramp import ramp_epochs
from lit_methods.video.video_action_detection.core import Mode, exp_rampup, mask_consistency


class ClipConsistency(LossTerm):
    """Adds the consistency of masks: those of the mirrored clip, mirrored back, are near those of the clip, where the attention says so.

    ``l2`` is mean (P - O)^2 of the logits O and P of the two views; ``bv`` weights it by how the predictions vary over neighbouring frames,
    rising with the epochs from ``l2``; ``gv`` by the second derivative of the prediction along the frames; ``bv+gv`` is the weighted sum.

    Runs: the submodule that ``target`` names is run once more in each training step, on the mirrored clip; all clips of the batch count,
    with labels or without. Losses are computed in float32 in any precision.
    Saves: nothing.
    Refuses: a submodule that isn't called once in a step with the clip as its first argument, (B, C, T, H, W); one that puts out no
    floating-point masks (B, 1, T, H, W) or (B, T, H, W); a ramp in a training without an end; what :class:`LossTerm` refuses.

    Args:
        target: Name or ``fnmatch`` pattern of the submodule that turns clips into masks; it must match one.
        output: Key or position of the masks in its output; None: the output itself, or the first of a tuple or list.
        consistency: ``l2``, ``bv``, ``gv`` or ``bv+gv``.
        n_frames: Neighbouring frames of ``bv``, odd.
        use_sigmoid: ``bv`` of probabilities in place of logits.
        lower: ``gv``: probabilities below it count as 0; None: none.
        upper: ``gv``: probabilities above it count as 1; None: none.
        gv_cross_batch: ``gv`` as in the released code, which weights each clip by the batch's mean mask.
        bv_weight: Factor of ``bv`` in ``bv+gv``.
        gv_weight: Factor of ``gv`` in ``bv+gv``.
        ramp_epochs: Epochs in which ``bv`` rises; None: all of the training.
        weight: Factor of the term.

    Raises:
        ValueError: An argument out of its range; while running, masks or clips of another form.

    Example:
        >>> ClipConsistency(target="network", consistency="gv").consistency
        'gv'
    """

    name = "clip_consistency"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Consistency of the views", ("clip_consistency/loss", "clip_consistency/l2"), note="l2 is without attention: on logits."),
        Curve("Mean attention", ("clip_consistency/attention",)),
    )

    def __init__(
        self,
        target: str = "network",
        output: str | int | None = None,
        consistency: Mode = "bv",
        n_frames: int = 5,
        use_sigmoid: bool = False,
        lower: float | None = None,
        upper: float | None = None,
        gv_cross_batch: bool = False,
        bv_weight: float = 0.5,
        gv_weight: float = 0.5,
        ramp_epochs: int | None = None,
        weight: float = 0.1,
    ) -> None:
        checks.literals(ClipConsistency, locals())
        checks.at_least(1, n_frames=n_frames, ramp_epochs=ramp_epochs)
        if n_frames % 2 == 0:
            raise ValueError(f"n_frames is {n_frames}: give an odd number, a frame and as many before as behind it")
        checks.share(lower=lower, upper=upper)
        checks.at_least(0, bv_weight=bv_weight, gv_weight=gv_weight, weight=weight)
        super().__init__([target], weight)
        self.target, self.output, self.consistency, self.ramp_epochs = target, output, consistency, ramp_epochs
        self.options: dict[str, Any] = {
            "n_frames": n_frames, "use_sigmoid": use_sigmoid, "lower": lower, "upper": upper, "gv_cross_batch": gv_cross_batch,
            "bv_weight": bv_weight, "gv_weight": gv_weight,
        }  # fmt: skip
        self._ramp = 1
        self._found: tuple[str, nn.Module] | None = None

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Find the submodule, and hook into it."""
        with naming("ClipConsistency"):
            self._found = one_submodule(pl_module, self.target, "target")
        super().hook_in(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """How long the ramp is.

        Raises:
            ValueError: The training has no end, and no ``ramp_epochs`` says it.
        """
        if "bv" in self.consistency:
            with naming("ClipConsistency"):
                self._ramp = ramp_epochs(pl_module, self.ramp_epochs)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the submodule."""
        super().leave(trainer, pl_module)
        self._found = None

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The consistency of this step.

        Raises:
            ValueError: Masks or clips are of another form, or the submodule was called several times.
        """
        assert self._found is not None
        name, network = self._found
        calls = inputs["feature_arguments"][name]
        if len(calls) != 1:
            raise ValueError(f"target={name!r} was called {len(calls)} times in a step: name a submodule that sees all clips at once")
        arguments, named = calls[0]
        clip = arguments[0] if arguments else None
        if not isinstance(clip, Tensor) or clip.ndim != 5 or not clip.is_floating_point():
            got = f"{tuple(clip.shape)} {clip.dtype}" if isinstance(clip, Tensor) else type(clip).__name__
            raise ValueError(f"target={name!r} is called with {got} first: expected clips (B, C, T, H, W) in floating point")
        first = self._masks(inputs["features"][name], name)
        second = self._masks(self.run_again(clip.flip(4), lambda mirrored: network(mirrored, *arguments[1:], **named)).output, name)
        ramp = exp_rampup(inputs["epoch"] + 1, self._ramp)
        found = mask_consistency(first, second, self.consistency, ramp=ramp, **self.options)
        logs = {"l2": found.l2}
        if found.attention is not None:
            logs["attention"] = found.attention.mean()
        return found.loss, logs

    def _masks(self, output: Any, name: str) -> Tensor:
        masks = output
        if self.output is not None:
            try:
                masks = output[self.output]
            except (KeyError, IndexError, TypeError):
                have = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
                raise ValueError(f"target={name!r} puts out {have}, which has no {self.output!r}: name the masks by output") from None
        elif isinstance(output, Sequence) and output:
            masks = output[0]
        if isinstance(masks, Tensor) and masks.ndim == 4:
            masks = masks.unsqueeze(1)
        if not isinstance(masks, Tensor) or masks.ndim != 5 or masks.shape[1] != 1 or not masks.is_floating_point():
            got = f"{tuple(masks.shape)} {masks.dtype}" if isinstance(masks, Tensor) else type(masks).__name__
            raise ValueError(f"target={name!r} puts out {got}: expected logits (B, 1, T, H, W) or (B, T, H, W); name them by output")
        return masks


__all__ = ["ClipConsistency"]
