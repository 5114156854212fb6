"""CIRIM as a LightningModule; with one cascade it is a recurrent inference machine.

Maths and origin: :mod:`lit_methods.inverse_problems.cirim.core`; what it is compared with:
:mod:`lit_methods.inverse_problems.cirim.baselines`.
"""

from typing import ClassVar

from lit_methods import checks
from lit_methods.arguments import handed_on
from lit_methods.catalog import Technique
from lit_methods.inverse_problems.cirim.base import Reconstruction, Schedule
from lit_methods.inverse_problems.cirim.core import Cell, CIRIMNetwork, Consistency, Loss
from lit_methods.inverse_problems.mri import Fourier, Normalization
from lit_methods.panels import Curve, Panel

TECHNIQUE = Technique(
    slug="cirim",
    short="CIRIM",
    title="Assessment of Data Consistency through Cascades of Independently Recurrent Inference Machines for fast and robust accelerated "
    "MRI reconstruction",
    arxiv="2111.15498",
    family="inverse_problems",
    form="module",
    classes=(
        "lit_methods.CIRIM",
        "lit_methods.EndToEndVarNet",
        "lit_methods.UNetReconstruction",
        "lit_methods.ZeroFilledReconstruction",
        "lit_methods.CompressedSensing",
    ),
    configs=("cirim.yaml", "cirim_varnet.yaml", "cirim_unet.yaml"),
    golden=("llgrad", "indrnn", "rim_block", "cirim_loss"),
    claim=(
        "Three cascades of recurrent inference machines reconstruct scans that are four times accelerated with a higher PSNR than a single "
        "one, after equally many steps."
    ),
    summary="Reconstructs accelerated multi-coil MRI by cascades of small recurrent networks that see the gradient of the likelihood.",
)


class CIRIM(Reconstruction):
    """Reconstructs accelerated multi-coil MRI by cascades of recurrent inference machines.

    A recurrent inference machine is a small recurrent network that sees an image x beside the gradient of its likelihood,
    A^H (A x - y) with A x = M F(S_c x), and adds to x what it makes of both, in T steps. CIRIM chains K of them with weights of their
    own and a cell whose channels remember themselves alone; each begins with the image and the hidden states of the one before.
    ``cascades: 1`` is IRIM, with ``cell: gru`` RIM.

    Runs: batches have ``kspace`` and ``maps`` (B, C, H, W, 2) float32, ``mask`` (B, 1, H, W, 1) bool, and to train and measure ``target``
    (B, H, W, 2), of which the magnitude counts; ``volume`` (B,) and ``maximum`` (B,), the volume's index and largest magnitude, make the
    figures those of volumes. K-space is 0 where the mask is false, and scaled so that its zero-filled image goes up to about 1. PSNR, SSIM
    and NMSE are means over volumes, beside those of the zero-filled image. Under any precision the Fourier transforms are in float32.

    Saves: the network.

    Refuses: batches whose shapes don't belong together, with what was expected.

    Args:
        cascades: K, >= 1.
        filters: Channels of the hidden states.
        time_steps: T, steps of each cascade.
        cell: Recurrent cell: ``indrnn``, ``gru`` or ``mgu``.
        consistency: ``implicit``: the likelihood's gradient alone; ``explicit``: a learned correction in k-space behind each cascade, too.
        recurrent_kernel: Side of the cells' kernels, odd.
        round_time_steps: Round T up to a multiple of 8, as the released code does.
        checkpointing: Compute each cascade again in the backward pass, in place of keeping its activations.
        centered: Frequency 0 stands in the middle of k-space, as in the datamodules here.
        normalization: Of the Fourier transform: ``ortho``, ``backward`` or ``forward``.
        loss: ``l1``, or ``ssim``: 0.9 (1 - SSIM) + 0.1 L1, of magnitudes over their maximum.
        accumulate: Train all steps of all cascades, later ones counting more; false: the last image alone.
        cascade_weights: Later cascades count more, as released; false: all alike, the paper's formula.
        per_sample: Divide by the maximum of each image in the loss; false: by that of the batch, as released.
        rescale: Measure each slice scaled to the largest magnitude of its target, since the loss sees no scale.
        learning_rate: Adam's learning rate.
        betas: Adam's two momentum decay rates.
        schedule: ``constant``, or ``inverse_sqrt``: a linear rise, then falling with the root of the step.
        warmup_ratio: Share of all steps that the rise takes, in [0, 1).

    Raises:
        ValueError: A value lies outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *Reconstruction.panels,
        Curve("Loss of each cascade", ("mri/loss_cascade/*",), note="Later ones should be lower.", goal="min"),
    )

    def __init__(
        self,
        cascades: int = 5,
        filters: int = 64,
        time_steps: int = 8,
        cell: Cell = "indrnn",
        consistency: Consistency = "implicit",
        recurrent_kernel: int = 1,
        round_time_steps: bool = False,
        checkpointing: bool = False,
        centered: bool = True,
        normalization: Normalization = "ortho",
        loss: Loss = "l1",
        accumulate: bool = True,
        cascade_weights: bool = True,
        per_sample: bool = False,
        rescale: bool = True,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        schedule: Schedule = "constant",
        warmup_ratio: float = 0.1,
    ) -> None:
        checks.literals(CIRIM, locals())
        checks.at_least(1, cascades=cascades, filters=filters, time_steps=time_steps, recurrent_kernel=recurrent_kernel)
        if recurrent_kernel % 2 == 0:
            raise ValueError(f"recurrent_kernel is {recurrent_kernel}: give an odd number, so that images keep their size")
        words = (cell, consistency, recurrent_kernel, Fourier(centered, normalization), round_time_steps, checkpointing)
        network = CIRIMNetwork(cascades, filters, time_steps, *words)
        super().__init__(**handed_on(Reconstruction, locals()))
        self.save_hyperparameters()


__all__ = ["CIRIM"]
