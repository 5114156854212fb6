"""CoTAP's ranking loss on any module: predicted similarities rank as given ones do (arXiv:2509.09429).

Maths and origin: :func:`lit_methods.self_supervised.cotap.core.continuous_ap_loss`.
"""

import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.batch import Key, find_in_batch, rows_of
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.panels import Curve, Panel
from lit_methods.self_supervised.cotap.core import continuous_ap_loss


class ContinuousAPLoss(LossTerm):
    """Adds a loss of the order of two lists of similarities: what the targets put on top shall be predicted on top.

    Average precision for continuous targets t and predictions s, with r_i = PN_i / PP_i and weights w_i = max(t_i + 0.2, 0):
    sum_i w_i r_i / (1 + r_i) / sum_i w_i. PN_i grows with the entries of smaller target that are predicted above entry i, or less than tau
    below it; PP_i counts those of larger target above it. It judges differences alone and bounds what one wrong target can do.

    Runs: around ``training_step``, on what ``student`` puts out there; all entries of the batch make one list, and with ``gather_ranks``
    those of all processes. No gradient flows into the targets.
    Saves: nothing.
    Refuses: predictions and targets of different lengths, and targets that aren't floating point.

    Args:
        student: Name or ``fnmatch`` pattern of the submodule whose output are the predicted similarities; it must match one.
        teacher: Key or position of the targets in the batch; None: ``target`` of a dictionary, 1 of a sequence.
        teacher_module: Name or pattern of a submodule whose output are the targets, in place of ``teacher``; None: the batch has them.
        match: Key or position of what is 1 for pairs of matching images in the batch; None: all match.
        tau: Distance of predictions from which a pair that ranks rightly costs nothing, in their unit.
        weight_threshold: Target at which an entry begins to count.
        unmatched_weight: Factor of the weight of entries that don't match.
        gather_ranks: One list of all processes; False: each process has its own.
        alone: The term is the whole loss, and the module's own is thrown away.
        weight: Factor of the whole term.

    Raises:
        ValueError: An argument out of its range; while running, lists that don't fit each other.
    """

    name = "continuous_ap"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Continuous average precision", ("continuous_ap/loss",), note="Loss, 0 to 1: 1 less the weighted precision.", goal="min"),
        Curve("Entries in wrong order, by those in right order", ("continuous_ap/pn_pp",), note="Mean of PN / PP.", goal="min"),
    )

    def __init__(
        self,
        student: str = "network",
        teacher: Key = None,
        teacher_module: str | None = None,
        match: Key = None,
        tau: float = 0.5,
        weight_threshold: float = -0.2,
        unmatched_weight: float = 0.1,
        gather_ranks: bool = True,
        alone: bool = False,
        weight: float = 1.0,
    ) -> None:
        checks.positive(tau=tau)
        checks.within("(-inf, inf)", weight_threshold=weight_threshold)
        checks.at_least(0, unmatched_weight=unmatched_weight)
        if teacher is not None and teacher_module is not None:
            raise ValueError(f"teacher={teacher!r} and teacher_module={teacher_module!r} both name the targets: give one of them")
        super().__init__([student] if teacher_module is None else [student, teacher_module], weight)
        self.student, self.teacher, self.teacher_module, self.match = student, teacher, teacher_module, match
        self.tau, self.weight_threshold, self.unmatched_weight = tau, weight_threshold, unmatched_weight
        self.gather_ranks, self.replaces = gather_ranks, alone

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch's list.

        Raises:
            ValueError: The lists don't fit each other.
        """
        calls = inputs["feature_calls"]
        predicted = rows_of(self._of(calls, self.student), self.student, "student").flatten()
        if self.teacher_module is not None:
            targets = rows_of(self._of(calls, self.teacher_module), self.teacher_module, "teacher_module").detach().flatten()
        else:
            targets = find_in_batch(inputs["batch"], self.teacher, ("target", 1), "teacher").flatten()
        match = None if self.match is None else find_in_batch(inputs["batch"], self.match, ("", 0), "match").flatten()
        if not targets.is_floating_point():
            raise ValueError(f"the targets are {targets.dtype}: expected similarities in floating point: name such ones by teacher")
        for name, other in (("targets", targets), ("values of match", match)):
            if other is not None and len(other) != len(predicted):
                raise ValueError(
                    f"student={self.student!r} puts out {len(predicted)} similarities and there are {len(other)} {name}: one each"
                )
        if self.gather_ranks:
            predicted, targets = self.gather(predicted), self.gather(targets)
            match = None if match is None else self.gather(match)
        numbers = (self.tau, self.weight_threshold, 1.0, self.unmatched_weight)
        found = continuous_ap_loss(targets, predicted, match, *numbers)
        return found.loss, {"pn_pp": (found.pn.detach() / found.pp).mean() if len(predicted) else torch.zeros_like(found.loss.detach())}

    @staticmethod
    def _of(calls: dict[str, Any], pattern: str) -> dict[str, Any]:
        """Calls of the submodules that a pattern of the two matches."""
        return {name: outputs for name, outputs in calls.items() if fnmatch.fnmatchcase(name, pattern)}


__all__ = ["ContinuousAPLoss"]
