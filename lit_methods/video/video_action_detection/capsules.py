"""VideoCapsuleNet: an I3D trunk, capsules whose votes are routed by expectation-maximisation, and a decoder of the chosen class's poses.

The architecture is that of K. Duarte, Y. S. Rawat, M. Shah: VideoCapsuleNet (arXiv:1805.08162), in the form in which AKASH2907/
pi-consistency-activity-detection trains it: one layer of class capsules on top of the primary ones. Routing follows Hinton, Sabour, Frosst:
Matrix Capsules with EM Routing (ICLR 2018).
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.checks import at_least, positive, share
from lit_methods.hub import leave_out
from lit_methods.runs.checkpoints import read_state_dict
from lit_methods.video.video_action_detection.networks import Detection

_EPS = 1e-8  # keeps variances, sums and logarithms away from 0
_INCEPTION = {  # layer: channels of its four branches (1x1, 3x3 reduced, 3x3, 3x3 reduced, 3x3, pooled)
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
}
FRAMES = 8  # of a clip: the trunk halves them three times, to one


# ---- trunk -----------------------------------------------------------------------------------------------------------------------------


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around clips so that a layer gives ceil(size / stride), one more behind than before where their number is odd."""
    sides: list[int] = []
    for size, width, step in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((math.ceil(size / step) - 1) * step + width - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class _Unit(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (1, 1, 1), stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_same(x, self.kernel, self.stride))))


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


class _Inception(nn.Module):
    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        cube = (3, 3, 3)
        self.b0 = _Unit(inputs, widths[0])
        self.b1a, self.b1b = _Unit(inputs, widths[1]), _Unit(widths[1], widths[2], cube)
        self.b2a, self.b2b = _Unit(inputs, widths[3]), _Unit(widths[3], widths[4], cube)
        self.b3b = _Unit(inputs, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b3b(_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], dim=1)


class I3DTrunk(nn.Module):
    """I3D up to ``Mixed_4f``, with the frames halved where VideoCapsuleNet halves them, and 1/8 of height and width from ``Mixed_3b`` on.

    Names of the layers are those of the public I3D weights in PyTorch, so that a file of them loads.

    Args:
        in_channels: Of the clips.
        width: Factor of all channels; 1 is I3D.

    Attributes:
        widths: Channels at 1/2, 1/4 and 1/8 of height and width.
    """

    def __init__(self, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * width))

        first, second = scaled(64), scaled(192)
        self.Conv3d_1a_7x7 = _Unit(in_channels, first, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(first, first)
        self.Conv3d_2c_3x3 = _Unit(first, second, (3, 3, 3), (2, 1, 1))
        inputs = second
        for name, branches in _INCEPTION.items():
            widths = tuple(map(scaled, branches))
            self.add_module(name, _Inception(inputs, widths))
            inputs = widths[0] + widths[2] + widths[4] + widths[5]
        self.widths = (first, second, inputs)

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 8, H, W) -> features at half, a quarter and an eighth of H and W, with 4, 2 and 1 frames."""
        half = self.Conv3d_1a_7x7(clip)
        quarter = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(_pool(half, (1, 3, 3), (1, 2, 2))))
        x = _pool(quarter, (1, 3, 3), (1, 2, 2))
        for name in _INCEPTION:
            if name == "Mixed_4b":
                x = _pool(x, (3, 3, 3), (2, 1, 1))
            x = self.get_submodule(name)(x)
        return half, quarter, x


# ---- capsules --------------------------------------------------------------------------------------------------------------------------


def em_routing(
    votes: Tensor, activation: Tensor, beta_u: Tensor, beta_a: Tensor, iterations: int = 3, inverse_temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Poses and activations of capsules that those below vote for: a mixture of Gaussians, fitted by expectation-maximisation.

    A capsule j gets the mean mu_j and the variance of the votes for it, weighted by how much of each vote it holds; its cost is
    sum_h (beta_u + log sigma_jh) times the votes it holds. Its activation is sigmoid(t (beta_a - z_j)), z_j the cost less the mean over the
    capsules, by their standard deviation: votes that agree make a capsule active.

    Args:
        votes: (N, I, C, D) poses that each of I capsules votes for, for each of C capsules.
        activation: (N, I) of the capsules that vote, 0 to 1.
        beta_u: (C, D), cost of a vote that is described.
        beta_a: (C,), gain of being active.
        iterations: Of expectation and maximisation, >= 1.
        inverse_temperature: t > 0.

    Returns:
        Poses (N, C, D) and activations (N, C), float32 or wider.
    """
    with torch.autocast(votes.device.type, enabled=False):
        wide = torch.promote_types(votes.dtype, torch.float32)
        votes, activation, beta_u, beta_a = (part.to(wide) for part in (votes, activation, beta_u, beta_a))
        share_of = votes.new_full(votes.shape[:3], 1 / votes.shape[2])  # r: how much of each vote each capsule holds
        for iteration in range(iterations):
            weight = share_of * activation[..., None]
            total = weight.sum(dim=1)  # (N, C)
            part = (weight / (total[:, None] + _EPS))[..., None]
            pose = (part * votes).sum(dim=1)
            variance = (part * (votes - pose[:, None]).square()).sum(dim=1) + _EPS
            half_log = variance.log() / 2
            cost = ((beta_u + half_log) * total[..., None]).sum(dim=2)
            spread = cost.var(dim=1, unbiased=False, keepdim=True).add(_EPS).sqrt()
            active = (inverse_temperature * (beta_a - (cost - cost.mean(dim=1, keepdim=True)) / spread)).sigmoid()
            if iteration < iterations - 1:
                likelihood = -((votes - pose[:, None]).square() / (2 * variance[:, None]) + half_log[:, None]).sum(dim=3)
                share_of = (likelihood + (active + _EPS).log()[:, None]).softmax(dim=2)
    return pose, active


def capsule_mask(scores: Tensor, labels: Tensor | None = None, pseudo: bool = True) -> Tensor:
    """Which class's poses the decoder sees.

    Args:
        scores: (B, C) class scores.
        labels: (B,) int64 of labelled clips, -1 for unlabelled ones; None: all are unlabelled.
        pseudo: Unlabelled clips show the class with the highest score; False: all classes, as in the first epochs.

    Returns:
        (B, C), 0 or 1, without gradient.
    """
    classes = scores.shape[1]
    guessed = F.one_hot(scores.argmax(dim=1), classes) if pseudo else torch.ones_like(scores, dtype=torch.int64)
    if labels is None:
        return guessed.to(scores.dtype)
    known = F.one_hot(labels.clamp(min=0), classes)
    return torch.where((labels >= 0)[:, None], known, guessed).to(scores.dtype)


class ClassCapsules(nn.Module):
    """A layer of class capsules at every place: each capsule type votes by a matrix of its own, and the votes are routed.

    Args:
        types: Capsule types below.
        classes: C.
        pose: Side P of the pose matrices.
        iterations: Of the routing.
        inverse_temperature: Of the activations.
    """

    def __init__(self, types: int, classes: int, pose: int, iterations: int, inverse_temperature: float) -> None:
        super().__init__()
        self.iterations, self.inverse_temperature = iterations, inverse_temperature
        self.weight = nn.Parameter(torch.randn(types, classes, pose, pose))
        self.beta_u = nn.Parameter(torch.randn(classes, pose * pose))
        self.beta_a = nn.Parameter(torch.randn(classes))

    def forward(self, poses: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        """(N, I, P, P) and (N, I) -> poses (N, C, P P) and activations (N, C)."""
        votes = torch.einsum("nipq,icqr->nicpr", poses, self.weight).flatten(3)
        return em_routing(votes, activation, self.beta_u, self.beta_a, self.iterations, self.inverse_temperature)


class VideoCapsuleNet(nn.Module):
    """VideoCapsuleNet on clips of 8 frames: class scores are mean activations of class capsules, and their poses are decoded into masks.

    Poses are masked by class before the decoder (:func:`capsule_mask`): that of the label, of the prediction, or none.

    Cost: 48 million parameters with 24 classes.

    Args:
        num_classes: C.
        capsule_types: Types of primary capsules.
        pose: Side of the pose matrices.
        kernel: Side of the convolution that makes primary capsules, in pixels of 1/8 of the clip.
        iterations: Of the routing.
        inverse_temperature: Of the activations.
        decoder: Channels of the decoder.
        width: Factor of the trunk's channels.
        dropout: Share of the channels that are left out in training, behind the trunk and before the last layer.
        in_channels: Of the clips.
        weights: File of I3D's weights for the trunk, such as those of Charades; None: random ones.

    Raises:
        ValueError: A number outside its range, or weights of another network.
    """

    uses_labels = True  # in training, for the poses

    def __init__(
        self,
        num_classes: int,
        capsule_types: int = 32,
        pose: int = 4,
        kernel: int = 9,
        iterations: int = 3,
        inverse_temperature: float = 1.0,
        decoder: int = 64,
        width: float = 1.0,
        dropout: float = 0.5,
        in_channels: int = 3,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        at_least(1, num_classes=num_classes, capsule_types=capsule_types, pose=pose, kernel=kernel, iterations=iterations)
        at_least(1, decoder=decoder, in_channels=in_channels)
        positive(width=width, inverse_temperature=inverse_temperature)
        share(dropout=dropout)
        self.kernel, self.pose, self.capsule_types = kernel, pose, capsule_types
        self.trunk = I3DTrunk(in_channels, width)
        half, quarter, eighth = self.trunk.widths
        self.dropout = nn.Dropout3d(dropout)
        self.primary_pose = nn.Conv2d(eighth, capsule_types * pose * pose, kernel)
        self.primary_activation = nn.Conv2d(eighth, capsule_types, kernel)
        self.class_capsules = ClassCapsules(capsule_types, num_classes, pose, iterations, inverse_temperature)
        up: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
        self.up_eighth = nn.ConvTranspose2d(num_classes * pose * pose, decoder, kernel)
        self.up_quarter = nn.ConvTranspose3d(2 * decoder, decoder, **up)
        self.up_half = nn.ConvTranspose3d(2 * decoder, decoder, **up)
        self.up_full = nn.ConvTranspose3d(2 * decoder, 2 * decoder, **up)
        self.smooth = nn.ConvTranspose3d(2 * decoder, 1, 3, padding=1)
        self.skip_eighth = nn.Conv2d(eighth, decoder, 3, padding=1)
        self.skip_quarter = nn.Conv3d(quarter, decoder, 3, padding=1)
        self.skip_half = nn.Conv3d(half, decoder, 3, padding=1)
        for layer, std in (
            (self.primary_pose, 0.1), (self.primary_activation, 0.1), (self.up_eighth, 0.02), (self.up_quarter, 0.02),
            (self.up_half, 0.02), (self.up_full, 0.02), (self.smooth, 0.02),
        ):  # fmt: skip
            nn.init.normal_(layer.weight, 0.0, std)
        if weights is not None and not leave_out("weights", weights):
            self._load_trunk(Path(weights))

    def _load_trunk(self, path: Path) -> None:
        """Weights of I3D; layers behind ``Mixed_4f`` are left aside."""
        state, needed = read_state_dict(path), self.trunk.state_dict()
        problems = [name for name in needed if name not in state or state[name].shape != needed[name].shape]
        if problems:
            raise ValueError(
                f"weights={str(path)!r} lacks {len(problems)} of {len(needed)} tensors of I3D up to Mixed_4f, or has them in another shape "
                f"({', '.join(problems[:3])}): give a file of I3D's weights in PyTorch with width=1, such as rgb_charades.pt"
            )
        self.trunk.load_state_dict({name: state[name] for name in needed})

    def forward(self, clip: Tensor, labels: Tensor | None = None, pseudo: bool = True) -> Detection:
        """Masks and class scores.

        Args:
            clip: (B, 3, 8, H, W) in [0, 1], H and W divisible by 8 and at least 8 times ``kernel``.
            labels: (B,) int64, -1 where unknown; None: all are.
            pseudo: See :func:`capsule_mask`.

        Raises:
            ValueError: Clips of another size.
        """
        size = (0, 0) if clip.ndim != 5 else (clip.shape[3], clip.shape[4])
        if clip.ndim != 5 or clip.shape[2] != FRAMES or any(side % 8 or side < 8 * self.kernel for side in size):
            raise ValueError(
                f"clips are {tuple(clip.shape)}: VideoCapsuleNet needs (B, channels, {FRAMES}, H, W), H and W divisible by 8 and "
                f"{8 * self.kernel} or more"
            )
        half, quarter, deep = self.trunk(clip)
        deep = self.dropout(deep).squeeze(2)
        poses, activation = self.primary_pose(deep), self.primary_activation(deep).sigmoid()
        batch, _, height, width = poses.shape
        below = poses.permute(0, 2, 3, 1).reshape(-1, self.capsule_types, self.pose, self.pose)
        above, active = self.class_capsules(below, activation.permute(0, 2, 3, 1).reshape(-1, self.capsule_types))
        active = active.view(batch, height * width, -1)
        scores = active.mean(dim=1)
        chosen = capsule_mask(scores.detach(), labels, pseudo)
        masked = above.view(batch, height, width, -1, self.pose**2) * chosen[:, None, None, :, None]
        x = F.relu(self.up_eighth(masked.flatten(3).permute(0, 3, 1, 2).to(deep.dtype)))
        x = torch.cat([x, F.relu(self.skip_eighth(deep))], dim=1).unsqueeze(2)
        x = torch.cat([F.relu(self.up_quarter(x)), F.relu(self.skip_quarter(quarter))], dim=1)
        x = torch.cat([F.relu(self.up_half(x)), F.relu(self.skip_half(half))], dim=1)
        logits = self.smooth(self.dropout(self.up_full(x)))
        return Detection(logits, scores, active)


__all__ = ["ClassCapsules", "I3DTrunk", "VideoCapsuleNet", "capsule_mask", "em_routing"]
