"""Robustness of LiDAR segmentation under corruption, as Robo3D (arXiv:2303.17597) defines it.

Its nuScenes-C holds eight corruptions (fog, wet ground, snow, motion blur, beam missing, crosstalk, incomplete echo, cross sensor) at
three levels each. Lay the corrupted scans of one corruption and level out like nuScenes and evaluate with
:class:`~lit_methods.datamodules.NuScenesDataModule` on that root; the mIoUs of all of them go in here.
"""

from torch import Tensor


def corruption_error(miou: Tensor, baseline: Tensor) -> Tensor:
    """Error under each corruption relative to a baseline model's: CE_i = sum_l (1 - mIoU_il) / sum_l (1 - baseline_il).

    Args:
        miou: (corruptions, levels) floating point in [0, 1].
        baseline: The same of the baseline, which errs at least somewhere in every corruption.

    Returns:
        (corruptions,), in percent: 100 is the baseline, less is better.

    Raises:
        ValueError: Shapes differ, a value lies outside [0, 1], or the baseline makes no error.
    """
    _check(miou, "miou")
    _check(baseline, "baseline")
    if miou.shape != baseline.shape:
        raise ValueError(f"miou {tuple(miou.shape)} and baseline {tuple(baseline.shape)} must both be (corruptions, levels)")
    reference = (1 - baseline).sum(dim=1)
    if (reference <= 0).any():
        raise ValueError(
            f"the baseline makes no error under corruption {int(reference.argmin())}: the ratio isn't defined, choose another baseline"
        )
    return 100 * (1 - miou).sum(dim=1) / reference


def mce(miou: Tensor, baseline: Tensor) -> Tensor:
    """Mean corruption error: the mean of :func:`corruption_error` over the corruptions, a scalar in percent; less is better."""
    return corruption_error(miou, baseline).mean()


def resilience_rate(miou: Tensor, clean: Tensor | float) -> Tensor:
    """Share of the clean mIoU that is left under each corruption: RR_i = sum_l mIoU_il / (levels * clean).

    Args:
        miou: (corruptions, levels) floating point in [0, 1].
        clean: mIoU on the clean data, in (0, 1].

    Returns:
        (corruptions,), in percent; more is better.

    Raises:
        ValueError: A value lies outside its range.
    """
    _check(miou, "miou")
    if not 0 < float(clean) <= 1:
        raise ValueError(f"clean={float(clean)} must lie in (0, 1]: give mIoU as a share, not in percent")
    return 100 * miou.mean(dim=1) / clean


def mrr(miou: Tensor, clean: Tensor | float) -> Tensor:
    """Mean resilience rate: the mean of :func:`resilience_rate` over the corruptions, a scalar in percent; more is better."""
    return resilience_rate(miou, clean).mean()


def _check(miou: Tensor, name: str) -> None:
    if miou.ndim != 2 or not miou.is_floating_point() or miou.numel() == 0:
        raise ValueError(f"{name} must be (corruptions, levels) floating point, got {tuple(miou.shape)} {miou.dtype}")
    if not bool(((miou >= 0) & (miou <= 1)).all()):
        raise ValueError(f"{name} holds values outside [0, 1]: give mIoU as a share, not in percent")
