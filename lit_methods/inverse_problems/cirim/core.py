"""Cascades of independently recurrent inference machines (arXiv:2111.15498): likelihood gradient, cells, block, cascades, loss.

Written from the paper's equations and checked against wdika/atommic@1abb819 (``collections/reconstruction/nn/``: ``cirim.py`` and
``rim_base/rim_block.py``, ``rim_utils.py``, ``rnn_cells.py``, ``conv_layers.py``), whose states and weights of the loss follow the paper
where those of the older wdika/mridc don't. Left out: recurrent cells over more than two layers, three-dimensional convolutions, and the
estimation of coil maps by a network.

Complex numbers are a last axis of 2. Shapes: image (B, H, W, 2), k-space and coil maps (B, C, H, W, 2), mask (1 or B, 1, H, W, 1) bool. The
measured k-space is 0 where the mask is false.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_methods.inverse_problems.mri import CENTERED, Fourier, fft2c, ifft2c, magnitude, sense_combine, sense_expand, sense_reduce

Cell = Literal["indrnn", "gru", "mgu"]
Consistency = Literal["implicit", "explicit"]
Loss = Literal["l1", "ssim"]
_STEPS = 8  # the released code rounds time steps up to a multiple of this


def log_likelihood_gradient(
    image: Tensor, kspace: Tensor, maps: Tensor, mask: Tensor, sigma: float = 1.0, fourier: Fourier = CENTERED
) -> Tensor:
    """The image beside the gradient of its Gaussian log-likelihood, which is the implicit data consistency.

    g = 1/s sum_c conj(S_c) F^-1(M (F(S_c x) - y_c)), with s = max(sigma, 1).

    Args:
        image: x, (B, H, W, 2).
        kspace: y, (B, C, H, W, 2).
        maps: S, (B, C, H, W, 2).
        mask: M, (1 or B, 1, H, W, 1).
        sigma: Standard deviation of the noise; below 1 it counts as 1.
        fourier: F.

    Returns:
        (B, 4, H, W), float32 or wider under any autocast: Re x, Im x, Re g, Im g.
    """
    residual = mask * (fft2c(sense_expand(image, maps), fourier) - kspace)
    gradient = sense_reduce(ifft2c(residual, fourier), maps) / max(sigma, 1.0)
    return torch.cat([image.to(gradient.dtype), gradient], -1).permute(0, 3, 1, 2)


# ---- recurrent cells --------------------------------------------------------------------------------------------------------------------


def indrnn_cell(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, recurrent: Tensor, dilation: int = 1) -> Tensor:
    """A cell whose channels remember themselves alone: h' = ReLU(conv(x) + w h).

    Args:
        x: (B, C, H, W).
        hidden: h, (B, f, H, W).
        weight: (f, C, k, k) of the convolution, which is padded with zeros; k odd.
        bias: (f,).
        recurrent: w, (1, f, 1, 1).
        dilation: Of the convolution.
    """
    padding = dilation * (weight.shape[-1] - 1) // 2
    return F.relu(F.conv2d(x, weight, bias, padding=padding, dilation=dilation) + recurrent * hidden)


class IndRNNCell(nn.Module):
    """:func:`indrnn_cell` with its weights, drawn from N(0, 1 / (f (1 + k^2))^2).

    Args:
        channels: Of the input.
        filters: f.
        kernel: k, odd.
        dilation: Of the convolution.
    """

    def __init__(self, channels: int, filters: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation
        self.ih = nn.Conv2d(channels, filters, kernel)
        self.hh = nn.Parameter(torch.empty(1, filters, 1, 1))
        for weight in (self.ih.weight, self.hh):
            nn.init.normal_(weight, 0.0, 1.0 / (filters * (1 + kernel**2)))
        nn.init.zeros_(self.ih.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(B, channels, H, W), (B, filters, H, W) -> (B, filters, H, W)."""
        assert self.ih.bias is not None
        return indrnn_cell(x, hidden, self.ih.weight, self.ih.bias, self.hh, self.dilation)


class GatedCell(nn.Module):
    """A convolutional GRU, or a minimal gated unit with two gates: the cells of recurrent inference machines before IndRNN.

    GRU: r, i = sigmoid(ih + hh), n = tanh(ih_n + r hh_n), h' = n + i (h - n). MGU: f = sigmoid(ih + hh), c = tanh(ih_c + f hh_c),
    h' = c + f (h - c). ``ih`` and ``hh`` are convolutions of the input (with bias) and of h (without), channels in this order.

    Args:
        channels: Of the input.
        filters: Of h.
        kernel: Side of the kernels, odd.
        dilation: Of the convolutions.
        gates: 3: GRU; 2: MGU.
    """

    def __init__(self, channels: int, filters: int, kernel: int = 1, dilation: int = 1, gates: int = 3) -> None:
        super().__init__()
        self.gates = gates
        padding = dilation * (kernel - 1) // 2
        self.ih = nn.Conv2d(channels, gates * filters, kernel, padding=padding, dilation=dilation)
        self.hh = nn.Conv2d(filters, gates * filters, kernel, padding=padding, dilation=dilation, bias=False)
        nn.init.zeros_(self.ih.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(B, channels, H, W), (B, filters, H, W) -> (B, filters, H, W)."""
        ours, theirs = self.ih(x).chunk(self.gates, 1), self.hh(hidden).chunk(self.gates, 1)
        keep = torch.sigmoid(ours[-2] + theirs[-2])
        reset = torch.sigmoid(ours[0] + theirs[0]) if self.gates == 3 else keep
        new = torch.tanh(ours[-1] + reset * theirs[-1])
        return new + keep * (hidden - new)


def make_cell(cell: Cell, channels: int, filters: int, kernel: int = 1) -> nn.Module:
    """A recurrent cell by name."""
    if cell == "indrnn":
        return IndRNNCell(channels, filters, kernel)
    return GatedCell(channels, filters, kernel, gates=3 if cell == "gru" else 2)


# ---- the network ------------------------------------------------------------------------------------------------------------------------


def explicit_consistency(
    kspace: Tensor, estimate: Tensor, image: Tensor, maps: Tensor, mask: Tensor, weight: Tensor, fourier: Fourier
) -> Tensor:
    """The learned, soft correction in k-space: y - lambda M (k - y) - F(S_c x). The sign of x is the network's to learn.

    Args:
        kspace: y, (B, C, H, W, 2).
        estimate: k, what the block began with; the same shape.
        image: x, (B, H, W, 2).
        maps: S, (B, C, H, W, 2).
        mask: M, (1 or B, 1, H, W, 1).
        weight: lambda, one number.
        fourier: F.
    """
    return kspace - weight * (mask * (estimate - kspace)) - fft2c(sense_expand(image, maps), fourier)


def _convolution(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """The convolution of an image that goes on beyond its border with its last pixels."""
    padding = convolution.dilation[0] * (convolution.kernel_size[0] - 1) // 2
    return convolution(F.pad(x, [padding] * 4, mode="replicate"))  # type: ignore[no-any-return]


class RIMBlock(nn.Module):
    """One cascade: a recurrent network that improves an image in T steps with the same weights.

    Each step: u = :func:`log_likelihood_gradient` of x; h0 = cell(ReLU(conv 5x5 (u)), h0); h1 = cell(ReLU(conv 3x3, dilation 2 (h0)), h1);
    x += conv 3x3 (h1).

    Args:
        filters: f, channels of both hidden states.
        time_steps: T.
        cell: ``indrnn``, ``gru`` or ``mgu``.
        consistency: ``implicit``: the likelihood's gradient alone; ``explicit``: with :func:`explicit_consistency`, lambda = 1 at first.
        recurrent_kernel: Side of the cells' kernels, odd.
        fourier: The Fourier transform.
    """

    dc_weight: nn.Parameter | None

    def __init__(
        self,
        filters: int = 64,
        time_steps: int = 8,
        cell: Cell = "indrnn",
        consistency: Consistency = "implicit",
        recurrent_kernel: int = 1,
        fourier: Fourier = CENTERED,
    ) -> None:
        super().__init__()
        self.filters, self.time_steps, self.fourier = filters, time_steps, fourier
        self.conv0 = nn.Conv2d(4, filters, 5)
        self.rnn0 = make_cell(cell, filters, filters, recurrent_kernel)
        self.conv1 = nn.Conv2d(filters, filters, 3, dilation=2)
        self.rnn1 = make_cell(cell, filters, filters, recurrent_kernel)
        self.conv2 = nn.Conv2d(filters, 2, 3, bias=False)
        for convolution in (self.conv0, self.conv1, self.conv2):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        self.register_parameter("dc_weight", nn.Parameter(torch.ones(1)) if consistency == "explicit" else None)

    def start(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of 0 for an image (B, H, W, 2)."""
        zeros = image.new_zeros(len(image), self.filters, *image.shape[1:3])
        return zeros, zeros

    def forward(
        self,
        kspace: Tensor,
        maps: Tensor,
        mask: Tensor,
        image: Tensor,
        hidden: tuple[Tensor, Tensor] | None = None,
        estimate: Tensor | None = None,
        sigma: float = 1.0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Improve an image.

        Args:
            kspace: Measured, (B, C, H, W, 2).
            maps: (B, C, H, W, 2).
            mask: (1 or B, 1, H, W, 1).
            image: Where to begin, (B, H, W, 2).
            hidden: Both hidden states, (B, f, H, W) each; None: 0.
            estimate: K-space that the image was made of, for the explicit data consistency; None: the measured one.
            sigma: Of the likelihood.

        Returns:
            What each step gives, (T, B, H, W, 2) images, or (T, B, C, H, W, 2) k-space with the explicit data consistency; the last hidden
            states.
        """
        first, second = self.start(image) if hidden is None else hidden
        images = []
        for _ in range(self.time_steps):
            features = log_likelihood_gradient(image, kspace, maps, mask, sigma, self.fourier)
            first = self.rnn0(F.relu(_convolution(features, self.conv0)), first)
            second = self.rnn1(F.relu(_convolution(first, self.conv1)), second)
            image = image + _convolution(second, self.conv2).permute(0, 2, 3, 1)
            images.append(image)
        if self.dc_weight is not None:
            estimate = kspace if estimate is None else estimate
            images = [explicit_consistency(kspace, estimate, x, maps, mask, self.dc_weight, self.fourier) for x in images]
        return torch.stack(images), (first, second)


class CIRIMNetwork(nn.Module):
    """K blocks of weights of their own, each beginning with the last image and hidden states of the one before.

    K = 1 is a recurrent inference machine: RIM with ``gru``, IRIM with ``indrnn``. With explicit data consistency a block hands k-space on,
    which the next one combines to its first image.

    Args:
        cascades: K.
        filters: Channels of the hidden states.
        time_steps: T of each block.
        cell: ``indrnn``, ``gru`` or ``mgu``.
        consistency: ``implicit`` or ``explicit``.
        recurrent_kernel: Side of the cells' kernels, odd.
        fourier: The Fourier transform.
        round_time_steps: Round T up to a multiple of 8, as the released code does.
        checkpointing: Keep no activations of a block but its inputs, and compute it again in the backward pass.
    """

    def __init__(
        self,
        cascades: int = 5,
        filters: int = 64,
        time_steps: int = 8,
        cell: Cell = "indrnn",
        consistency: Consistency = "implicit",
        recurrent_kernel: int = 1,
        fourier: Fourier = CENTERED,
        round_time_steps: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        steps = _STEPS * math.ceil(time_steps / _STEPS) if round_time_steps else time_steps
        self.explicit, self.fourier, self.checkpointing = consistency == "explicit", fourier, checkpointing
        self.cascades = nn.ModuleList(RIMBlock(filters, steps, cell, consistency, recurrent_kernel, fourier) for _ in range(cascades))

    def forward(self, kspace: Tensor, maps: Tensor, mask: Tensor, sigma: float = 1.0) -> Tensor:
        """Reconstruct.

        Args:
            kspace: Measured, (B, C, H, W, 2).
            maps: (B, C, H, W, 2).
            mask: (1 or B, 1, H, W, 1).
            sigma: Of the likelihood.

        Returns:
            Images of all steps of all cascades, (K, T, B, H, W, 2); the reconstruction is the last of the last.
        """
        image, hidden, estimate = sense_combine(kspace, maps, self.fourier), None, None
        found = []
        for block in self.cascades:
            words = (kspace, maps, mask, image, hidden, estimate, sigma)
            if self.checkpointing and torch.is_grad_enabled():
                images, hidden = checkpoint(block, *words, use_reentrant=False)
            else:
                images, hidden = block(*words)
            if self.explicit:
                estimate = images[-1]
                images = torch.stack([sense_combine(k, maps, self.fourier) for k in images])
            image = images[-1]
            found.append(images)
        return torch.stack(found)


# ---- the loss ---------------------------------------------------------------------------------------------------------------------------


def normalised_magnitude(image: Tensor, per_sample: bool = False) -> Tensor:
    """|x| / max |x|, (..., B, H, W) of (..., B, H, W, 2); 0 where all is 0.

    Args:
        image: Images.
        per_sample: The maximum is that of each image; false: of the batch, as released, so that results depend on what is in it.
    """
    size = magnitude(image)
    largest = size.amax((-2, -1), keepdim=True) if per_sample else size.amax((-3, -2, -1), keepdim=True)
    return size / torch.where(largest > 0, largest, 1)


def step_weights(number: int, like: Tensor) -> Tensor:
    """10^-1 to 10^0 in even ratios; of a single step 0.1, as ``torch.logspace`` has it."""
    return torch.logspace(-1, 0, number, dtype=like.dtype, device=like.device)


def image_distance(prediction: Tensor, target: Tensor, loss: Loss = "l1") -> Tensor:
    """Mean |p - t|, or 0.9 (1 - SSIM) + 0.1 of it, of magnitudes (B, H, W) whose largest is 1: one number."""
    absolute = (prediction - target).abs().mean()
    if loss == "l1":
        return absolute
    from torchmetrics.functional.image import structural_similarity_index_measure

    with torch.autocast(prediction.device.type, enabled=False):
        similarity = structural_similarity_index_measure(
            prediction[:, None], target[:, None], gaussian_kernel=False, kernel_size=7, data_range=1.0
        )
    assert isinstance(similarity, Tensor)
    return 0.9 * (1 - similarity) + 0.1 * absolute


def accumulated_loss(
    predictions: Tensor,
    target: Tensor,
    loss: Loss = "l1",
    cascade_weights: bool = True,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of every step of every cascade, later ones counting more.

    L = 1/K sum_k W_k 1/T sum_t w_t l_kt with w = :func:`step_weights` of T, W of K, and l the distance of normalised magnitudes.

    Args:
        predictions: (K, T, B, H, W, 2).
        target: (B, H, W, 2).
        loss: ``l1`` or ``ssim``.
        cascade_weights: False: W = 1, which is the paper's formula.
        per_sample: Normalise each image by its own maximum; false: by the batch's, as released.

    Returns:
        L; the loss of each cascade before W, (K,).

    Raises:
        ValueError: The shapes don't belong together.
    """
    if predictions.ndim != 6 or predictions.shape[2:] != target.shape:
        raise ValueError(
            f"predictions are {tuple(predictions.shape)} and the target {tuple(target.shape)}: expected (K, T, B, H, W, 2) and (B, H, W, 2)"
        )
    truth, found = normalised_magnitude(target, per_sample), normalised_magnitude(predictions, per_sample)
    distances = torch.stack([torch.stack([image_distance(step, truth, loss) for step in cascade]) for cascade in found])
    each = (distances * step_weights(distances.shape[1], distances)).mean(1)
    weights = step_weights(len(each), each) if cascade_weights else torch.ones_like(each)
    return (weights * each).mean(), each


def consistency_residual(image: Tensor, kspace: Tensor, maps: Tensor, mask: Tensor, fourier: Fourier = CENTERED) -> Tensor:
    """|M (F(S_c x) - y)| / |y| of each sample, (B,): how far an image is from what was measured; 0 where nothing was."""
    residual = mask * (fft2c(sense_expand(image, maps), fourier) - kspace)
    size = torch.linalg.vector_norm(kspace.flatten(1), dim=1)
    return torch.linalg.vector_norm(residual.flatten(1), dim=1) / torch.where(size > 0, size, 1)


__all__ = [
    "CIRIMNetwork",
    "GatedCell",
    "IndRNNCell",
    "RIMBlock",
    "accumulated_loss",
    "consistency_residual",
    "explicit_consistency",
    "indrnn_cell",
    "log_likelihood_gradient",
    "normalised_magnitude",
]
