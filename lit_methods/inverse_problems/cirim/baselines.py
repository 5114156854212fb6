"""The modules that CIRIM is compared with, trained and measured in the same way."""

from lit_methods import checks
from lit_methods.arguments import handed_on
from lit_methods.inverse_problems.cirim.base import Reconstruction, Schedule
from lit_methods.inverse_problems.cirim.core import Consistency, Loss
from lit_methods.inverse_problems.cirim.networks import UNetNetwork, VarNetNetwork, WaveletNetwork, ZeroFilledNetwork
from lit_methods.inverse_problems.mri import Fourier, Normalization


class EndToEndVarNet(Reconstruction):
    """Reconstructs accelerated multi-coil MRI by the end-to-end variational network (arXiv:2004.06688), with given coil maps.

    Runs: on the batches of ``CIRIM``; the loss is that of the last cascade's image.

    Saves: the network.

    Refuses: batches whose shapes don't belong together.

    Args:
        cascades: Cascades, >= 1.
        channels: Channels of the first level of each U-Net; each further one has twice as many.
        pools: Levels below the first.
        consistency: ``explicit``: the learned correction in k-space; ``implicit``: none.
        centered: Frequency 0 stands in the middle of k-space.
        normalization: Of the Fourier transform: ``ortho``, ``backward`` or ``forward``.
        loss: ``l1`` or ``ssim``.
        per_sample: Divide by the maximum of each image in the loss; false: by that of the batch.
        rescale: Measure each slice scaled to the largest magnitude of its target.
        learning_rate: Adam's learning rate.
        betas: Adam's two momentum decay rates.
        schedule: ``constant`` or ``inverse_sqrt``.
        warmup_ratio: Share of all steps that the rise of ``inverse_sqrt`` takes, in [0, 1).

    Raises:
        ValueError: A value lies outside its range.
    """

    def __init__(
        self,
        cascades: int = 8,
        channels: int = 18,
        pools: int = 4,
        consistency: Consistency = "explicit",
        centered: bool = True,
        normalization: Normalization = "ortho",
        loss: Loss = "l1",
        per_sample: bool = False,
        rescale: bool = True,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        schedule: Schedule = "constant",
        warmup_ratio: float = 0.1,
    ) -> None:
        checks.literals(EndToEndVarNet, locals())
        network = VarNetNetwork(cascades, channels, pools, consistency, Fourier(centered, normalization))
        super().__init__(**handed_on(Reconstruction, locals(), accumulate=False))
        self.save_hyperparameters()


class UNetReconstruction(Reconstruction):
    """Reconstructs accelerated multi-coil MRI by a U-Net of the zero-filled image, without any look at k-space.

    Runs: on the batches of ``CIRIM``.

    Saves: the network.

    Refuses: batches whose shapes don't belong together.

    Args:
        channels: Channels of the first level; each further one has twice as many.
        pools: Levels below the first.
        centered: Frequency 0 stands in the middle of k-space.
        normalization: Of the Fourier transform: ``ortho``, ``backward`` or ``forward``.
        loss: ``l1`` or ``ssim``.
        per_sample: Divide by the maximum of each image in the loss; false: by that of the batch.
        rescale: Measure each slice scaled to the largest magnitude of its target.
        learning_rate: Adam's learning rate.
        betas: Adam's two momentum decay rates.
        schedule: ``constant`` or ``inverse_sqrt``.
        warmup_ratio: Share of all steps that the rise of ``inverse_sqrt`` takes, in [0, 1).

    Raises:
        ValueError: A value lies outside its range.
    """

    def __init__(
        self,
        channels: int = 32,
        pools: int = 4,
        centered: bool = True,
        normalization: Normalization = "ortho",
        loss: Loss = "l1",
        per_sample: bool = False,
        rescale: bool = True,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        schedule: Schedule = "constant",
        warmup_ratio: float = 0.1,
    ) -> None:
        checks.literals(UNetReconstruction, locals())
        network = UNetNetwork(channels, pools, Fourier(centered, normalization))
        super().__init__(**handed_on(Reconstruction, locals(), accumulate=False))
        self.save_hyperparameters()


class ZeroFilledReconstruction(Reconstruction):
    """Takes what was not measured as 0: the floor of all reconstructions. For ``lit validate``, ``lit test`` and ``lit predict``.

    Runs: on the batches of ``CIRIM``.

    Saves: nothing.

    Refuses: ``fit``, since there is nothing to train.

    Args:
        centered: Frequency 0 stands in the middle of k-space.
        normalization: Of the Fourier transform: ``ortho``, ``backward`` or ``forward``.
        rescale: Measure each slice scaled to the largest magnitude of its target.
    """

    def __init__(self, centered: bool = True, normalization: Normalization = "ortho", rescale: bool = True) -> None:
        checks.literals(ZeroFilledReconstruction, locals())
        super().__init__(ZeroFilledNetwork(Fourier(centered, normalization)), rescale=rescale)
        self.save_hyperparameters()


class CompressedSensing(Reconstruction):
    """Reconstructs by compressed sensing: min 1/2 |A x - y|^2 + weight |W x|_1 with wavelets, by sigpy's solver on the CPU.

    For ``lit validate``, ``lit test`` and ``lit predict``; needs ``pip install 'lit-methods[mri]'``. K-space is that of a centred ``ortho``
    transform, which the datamodules here give.

    Runs: on the batches of ``CIRIM``, slice by slice.

    Saves: nothing.

    Refuses: ``fit``, since there is nothing to train.

    Args:
        weight: Of the wavelets' L1 norm, > 0, for k-space whose zero-filled image goes up to about 1.
        iterations: Of the solver.
        rescale: Measure each slice scaled to the largest magnitude of its target.

    Raises:
        ValueError: A value lies outside its range.
        ImportError: sigpy isn't installed.
    """

    def __init__(self, weight: float = 0.005, iterations: int = 60, rescale: bool = True) -> None:
        super().__init__(WaveletNetwork(weight, iterations), rescale=rescale)
        self.save_hyperparameters()


__all__ = ["CompressedSensing", "EndToEndVarNet", "UNetReconstruction", "ZeroFilledReconstruction"]
