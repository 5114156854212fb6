"""Group bias adaptation as pure functions: neurons in groups, how often each fires, and the feedback on their biases.

Paper: "Taming Polysemanticity in LLMs: Provable Feature Recovery via Sparse Autoencoders", arXiv:2506.14002. The authors' code was not
available: the golden vectors are a reconstruction from secondary sources, which a public reimplementation agrees with.

Left out: the simplified variant of the theory, in which all neurons share one fixed bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_methods import checks


def neuron_groups(neurons: int, groups: int) -> Tensor:
    """Group of each neuron: consecutive ones, the groups as equal in size as they can be.

    Args:
        neurons: M >= 1.
        groups: K in [1, M].

    Returns:
        (M,) int64 in [0, K), rising.

    Raises:
        ValueError: More groups than neurons, or none.
    """
    checks.within(f"[1, {neurons}]", f"as many groups as there are neurons ({neurons}) or fewer, in", groups=groups)
    return torch.arange(neurons) * groups // neurons


def target_frequencies(groups: int, highest: float, lowest: float) -> Tensor:
    """Geometric targets p_1 = ``highest`` > ... > p_K = ``lowest``: the ratio of neighbours is constant.

    Args:
        groups: K >= 1; a single group has the target ``highest``, which is bias adaptation without groups.
        highest: Frequency (share of the samples) in (0, 1].
        lowest: Frequency in (0, ``highest``].

    Returns:
        (K,) float64.

    Raises:
        ValueError: A number outside its range.
    """
    checks.at_least(1, "groups", groups=groups)
    checks.within("(0, 1]", "a share of the samples", highest=highest)
    checks.within(f"(0, {highest}]", "a share of the samples that isn't above the highest,", lowest=lowest)
    place = torch.arange(groups, dtype=torch.float64) / max(1, groups - 1)
    return highest * (lowest / highest) ** place


def firing_statistics(pre_activations: Tensor) -> tuple[Tensor, Tensor]:
    """How often each neuron fires in a batch, and its peak.

    Args:
        pre_activations: (B, M) y, which includes the bias; floating point, B >= 0.

    Returns:
        (M,) int64, rows with y > 0; and (M,) float32 or wider, the peak r = max(max y, 0), 0 for no rows.
    """
    firing = (pre_activations > 0).sum(0)
    rows = pre_activations if len(pre_activations) else pre_activations.new_zeros(1, pre_activations.shape[1])
    peak = rows.amax(0).clamp(min=0)
    return firing, peak.to(torch.promote_types(peak.dtype, torch.float32))


class BiasUpdate(NamedTuple):
    """What :func:`bias_update` finds.

    Attributes:
        bias: (M,) the new biases.
        frequency: (M,) share of the samples in which each neuron fired.
        group_peak: (K,) mean of the positive peaks in each group; 0 where there are none.
        lowered: (M,) bool, neurons that fired too often.
        raised: (M,) bool, neurons that count as dead.
    """

    bias: Tensor
    frequency: Tensor
    group_peak: Tensor
    lowered: Tensor
    raised: Tensor


def bias_update(
    bias: Tensor,
    firing: Tensor,
    peak: Tensor,
    samples: Tensor | int,
    group: Tensor,
    target: Tensor,
    gamma_plus: float = 0.01,
    gamma_minus: float = 0.01,
    epsilon: float = 1e-6,
) -> BiasUpdate:
    """One step of the feedback: who fires more often than its group's target is lowered, who never fires is raised.

    With p_m = firing / samples, peak r_m, and T_k the mean of the positive peaks in group k::

        p_m > target_k:      b_m <- max(b_m - gamma_minus * r_m, -1)
        else p_m < epsilon:  b_m <- min(b_m + gamma_plus * T_k, 0)
        else                 b_m unchanged

    A target is an upper bound and no set point: a neuron below it that fires at all is left alone. A group in which nobody has a positive
    peak can't raise its dead neurons, since T_k is 0.

    Args:
        bias: (M,) floating point.
        firing: (M,) how many samples each neuron fired in, since the last update.
        peak: (M,) max(max y, 0) over these samples.
        samples: How many they were, >= 1; a number or a scalar tensor.
        group: (M,) int64 in [0, K).
        target: (K,) target frequencies.
        gamma_plus: Step of raising, >= 0.
        gamma_minus: Step of lowering, >= 0.
        epsilon: A neuron that fires more rarely is dead.

    Returns:
        The new biases in the dtype of ``bias``, and what they follow from, in float32 or wider.
    """
    wide = torch.promote_types(peak.dtype, torch.float32)
    frequency = firing.to(wide) / samples
    total = peak.new_zeros(len(target), dtype=wide).index_add_(0, group, peak.to(wide))
    positive = peak.new_zeros(len(target), dtype=wide).index_add_(0, group, (peak > 0).to(wide))
    group_peak = total / positive.clamp(min=1)
    lowered = frequency > target.to(wide)[group]
    raised = (frequency < epsilon) & ~lowered
    b = bias.to(wide)
    lower, higher = (b - gamma_minus * peak).clamp(min=-1), (b + gamma_plus * group_peak[group]).clamp(max=0)
    new = torch.where(lowered, lower, torch.where(raised, higher, b))
    return BiasUpdate(new.to(bias.dtype), frequency, group_peak, lowered, raised)


__all__ = ["BiasUpdate", "bias_update", "firing_statistics", "neuron_groups", "target_frequencies"]
