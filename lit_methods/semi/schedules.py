"""Learning rates of semi-supervised training, as factors of the full one."""

import math


def seven_sixteenths_cosine(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """cos(7 pi t / (16 T)) behind a linear warm-up: FixMatch's schedule (arXiv:2001.07685, section 4); never below 0.

    Args:
        step: Optimiser steps done, >= 0.
        total_steps: Of the whole training, the warm-up among them.
        warmup_steps: Of linear rise from 0.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, math.cos(7 / 16 * math.pi * progress))


def warmup_then_epoch_cosine(step: int, steps_per_epoch: int, epochs: int, warmup_epochs: int = 0) -> float:
    """Linear per step over the warm-up, then half a cosine that changes once per epoch (SimMatchV2's recipe).

    Args:
        step: Optimiser steps done, >= 0.
        steps_per_epoch: Optimiser steps per epoch, >= 1.
        epochs: Of the whole training, the warm-up among them.
        warmup_epochs: Of linear rise; the first step has 1 / (number of warm-up steps).
    """
    epoch = step // steps_per_epoch
    if epoch < warmup_epochs:
        return (step + 1) / (warmup_epochs * steps_per_epoch)
    return (1 + math.cos(math.pi * (epoch - warmup_epochs) / max(1, epochs - warmup_epochs))) / 2
