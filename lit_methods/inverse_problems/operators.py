"""Linear operators A of inverse problems y = A x + noise: forward, adjoint, pseudo-inverse, composition.

Tensors are batches: dimension 0 counts samples, and each sample is mapped by itself. All is computed in float32 or wider with autocast
off, so that no FFT and no sum over an image runs in half precision; float64 stays float64. An operator works as deepinv's
``LinearPhysics`` does (``A``, ``A_adjoint``, ``A_dagger``), :func:`as_operator` takes one of theirs, and :func:`to_deepinv` makes one.

Operators on k-space stand in :mod:`lit_methods.inverse_problems.mri`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks


def precise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What a function gives of tensors in float32 or wider (complex64 or wider), with autocast off.

    Args:
        function: Called with the tensors.
        *tensors: At least one; of any floating, complex or integer type.
    """
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner product of each sample, (B,); of complex tensors the real part."""
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.flatten(1).sum(1)


def least_squares(forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], y: Tensor, iterations: int) -> Tensor:
    """The x of smallest norm that minimises |A x - y|^2 for each sample, by conjugate gradients on the normal equations (CGLS) from x = 0.

    Args:
        forward: A.
        adjoint: A^T.
        y: (B, ...), real or complex.
        iterations: How many, without a look at the residual, so that no device is waited for. A sample whose gradient fell to rounding
            errors changes no more: further iterations would only add them up where A loses something.

    Returns:
        x of the shape that ``adjoint`` gives.
    """
    residual = y
    gradient = direction = adjoint(y)
    x, size = torch.zeros_like(gradient), _inner(gradient, gradient)
    enough = size * torch.finfo(gradient.dtype).eps ** 1.5
    for _ in range(iterations):
        image = forward(direction)
        curvature = _inner(image, image)
        going = (size > enough) & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1), 0)
        x = x + step.reshape(-1, *[1] * (x.ndim - 1)) * direction
        residual = residual - step.reshape(-1, *[1] * (y.ndim - 1)) * image
        gradient, before = adjoint(residual), size
        size = torch.where(going, _inner(gradient, gradient), size)
        direction = gradient + (size / torch.where(before > 0, before, 1)).reshape(-1, *[1] * (x.ndim - 1)) * direction
    return x


class LinearOperator(nn.Module):
    """A linear map of each sample of a batch. Subclasses write ``_forward`` and ``_adjoint``, and ``_pseudo_inverse`` where they know it.

    ``operator(x)`` and ``operator.forward(x)`` are A x, ``adjoint(y)`` is A^T y (A^H y of complex tensors), ``pseudo_inverse(y)`` the
    solution of smallest norm of least squares, A^+ y. ``first @ second`` maps by ``second``, then by ``first``. Tensors of an operator
    move with ``.to(device)`` and are no part of a ``state_dict``.

    Args:
        iterations: Conjugate gradient iterations of a pseudo-inverse that has no closed form.
    """

    def __init__(self, iterations: int = 50) -> None:
        super().__init__()
        checks.at_least(1, iterations=iterations)
        self.iterations = iterations

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _pseudo_inverse(self, y: Tensor) -> Tensor:
        return least_squares(self._forward, self._adjoint, y, self.iterations)

    def forward(self, x: Tensor) -> Tensor:
        """A x, in float32 or wider."""
        return precise(self._forward, x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, in float32 or wider."""
        return precise(self._adjoint, y)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y, in float32 or wider."""
        return precise(self._pseudo_inverse, y)

    def __matmul__(self, other: "LinearOperator") -> "Composition":
        return Composition(self, as_operator(other))

    # deepinv's names for the same

    def A(self, x: Tensor, **_: Any) -> Tensor:
        """A x: deepinv's name of ``forward``. Parameters of a physics, such as a new mask, are not taken."""
        return self.forward(x)

    def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
        """A^T y: deepinv's name of ``adjoint``."""
        return self.adjoint(y)

    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """The vector-Jacobian product at any x, A^T v."""
        return self.adjoint(v)

    def A_dagger(self, y: Tensor, **_: Any) -> Tensor:
        """A^+ y: deepinv's name of ``pseudo_inverse``."""
        return self.pseudo_inverse(y)

    def A_adjoint_A(self, x: Tensor, **_: Any) -> Tensor:
        """A^T A x."""
        return self.adjoint(self.forward(x))

    def A_A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
        """A A^T y."""
        return self.forward(self.adjoint(y))


class Composition(LinearOperator):
    """``outer @ inner``: A x = outer(inner(x)). The pseudo-inverse is that of the product, by conjugate gradients.

    Args:
        outer: Maps last.
        inner: Maps first.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        super().__init__(max(outer.iterations, inner.iterations))
        self.outer, self.inner = outer, inner

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer._forward(self.inner._forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner._adjoint(self.outer._adjoint(y))


class Blur(LinearOperator):
    """Convolution of each channel with one kernel.

    Args:
        kernel: (kh, kw), any real values; its middle is at (kh // 2, kw // 2).
        padding: ``circular``: the image goes on at the opposite side, which gives a pseudo-inverse in closed form; ``zeros``: it is black
            around.
        threshold: Frequencies that the kernel scales to less than this share of the largest count as lost in the pseudo-inverse, in (0, 1).
        iterations: Conjugate gradient iterations of the pseudo-inverse with ``zeros``.

    Raises:
        ValueError: The kernel isn't a matrix, or an image is smaller than it.
    """

    kernel: Tensor

    def __init__(
        self, kernel: Tensor, padding: Literal["circular", "zeros"] = "circular", threshold: float = 1e-6, iterations: int = 50
    ) -> None:
        super().__init__(iterations)
        checks.literals(Blur, locals())
        checks.within("(0, 1)", threshold=threshold)
        if kernel.ndim != 2 or not kernel.numel():
            raise ValueError(f"kernel is {tuple(kernel.shape)}: give one of (height, width)")
        self.padding, self.threshold = padding, threshold
        self.register_buffer("kernel", kernel.detach(), persistent=False)
        self._transformed: tuple[Any, Tensor] | None = None  # for which images, and what _transfer gave for them

    def _transfer(self, x: Tensor) -> Tensor:
        """The kernel's Fourier transform at the image's size, (H, W // 2 + 1) complex."""
        height, width = self.kernel.shape
        if x.shape[-2] < height or x.shape[-1] < width:
            raise ValueError(
                f"images of {tuple(x.shape[-2:])} are smaller than the blur's kernel of {(height, width)}: give a smaller kernel"
            )
        key = x.shape[-2:], x.dtype, x.device, self.kernel._version, self.kernel.data_ptr()
        if self._transformed is None or self._transformed[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must do for a training step, too
                padded = F.pad(self.kernel.to(x), (0, x.shape[-1] - width, 0, x.shape[-2] - height))
                self._transformed = key, torch.fft.rfft2(padded.roll((-(height // 2), -(width // 2)), (0, 1)))
        return self._transformed[1]

    def _filter(self, x: Tensor, transfer: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])

    def _zeros(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Correlation of all channels with a kernel whose middle is at (kh // 2, kw // 2), zeros around."""
        height, width = kernel.shape
        padded = F.pad(x, (width // 2, (width - 1) // 2, height // 2, (height - 1) // 2))
        return F.conv2d(padded.reshape(-1, 1, *padded.shape[-2:]), kernel.to(x)[None, None]).reshape(x.shape)

    def _forward(self, x: Tensor) -> Tensor:
        if self.padding == "circular":
            return self._filter(x, self._transfer(x))
        height, width = self.kernel.shape  # a convolution is the correlation with the turned kernel, whose middle must stay where it is
        turned = F.pad(self.kernel.flip(0, 1), (1 - width % 2, 0, 1 - height % 2, 0))
        return self._zeros(x, turned)

    def _adjoint(self, y: Tensor) -> Tensor:
        if self.padding == "circular":
            return self._filter(y, self._transfer(y).conj())
        return self._zeros(y, self.kernel)

    def _pseudo_inverse(self, y: Tensor) -> Tensor:
        if self.padding != "circular":
            return super()._pseudo_inverse(y)
        transfer = self._transfer(y)
        size = transfer.abs()
        kept = size > self.threshold * size.max()
        return self._filter(y, torch.where(kept, transfer.conj() / torch.where(kept, size.square(), 1), 0))


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """A Gaussian blur's kernel, (size, size) float64 with sum 1; sigma in pixels."""
    checks.at_least(1, size=size)
    checks.positive(sigma=sigma)
    line = torch.exp(-(torch.arange(size, dtype=torch.float64) - size // 2).square() / (2 * sigma**2))
    return torch.outer(line, line) / line.sum() ** 2


def motion_kernel(size: int, generator: torch.Generator, smoothness: float = 0.9, steps: int = 500) -> Tensor:
    """A kernel of a camera that moves by chance, (size, size) float64, >= 0 with sum 1.

    The camera's path is a walk whose velocity keeps ``smoothness`` of itself in each of its steps; it is scaled to fill the kernel, and the
    time that it spends at each pixel is the kernel's value, dealt to four pixels bilinearly.

    Args:
        size: Pixels of a side, >= 2.
        generator: Source of the walk.
        smoothness: In [0, 1): 0 is a tangle, near 1 a nearly straight line.
        steps: Of the walk.
    """
    checks.at_least(2, size=size)
    checks.within("[0, 1)", smoothness=smoothness)
    checks.at_least(2, steps=steps)
    pushes = torch.randn(steps, 2, generator=generator, dtype=torch.float64)
    decay = smoothness ** torch.arange(steps, dtype=torch.float64)
    velocity = torch.stack([F.conv1d(F.pad(push[None], (steps - 1, 0)), decay.flip(0)[None, None])[0] for push in pushes.T], 1)
    path = velocity.cumsum(0)
    low, high = path.amin(0), path.amax(0)
    path = (path - (low + high) / 2) / (high - low).max().clamp(min=1e-12) * (size - 2) + (size - 1) / 2
    corner = path.floor().long().clamp(0, size - 2)
    part = path - corner
    kernel = torch.zeros(size * size, dtype=torch.float64)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = (part[:, 0] if down else 1 - part[:, 0]) * (part[:, 1] if right else 1 - part[:, 1])
        kernel.index_add_(0, (corner[:, 0] + down) * size + corner[:, 1] + right, weight)
    return (kernel / kernel.sum()).reshape(size, size)


def bicubic_matrix(size: int, factor: int) -> Tensor:
    """Bicubic reduction of a line of pixels, (size / factor, size) float64: Keys' kernel with a = -1/2, widened by the factor.

    Each output is the weighted mean of the 4 x factor pixels around it; the line is mirrored at its ends. Rows sum to 1.

    Raises:
        ValueError: The factor doesn't divide the size.
    """
    checks.at_least(1, size=size, factor=factor)
    if size % factor:
        raise ValueError(f"a side of {size} pixels can't be reduced by {factor}: give a size that it divides, or crop the images")
    centre = (torch.arange(size // factor, dtype=torch.float64) + 0.5) * factor - 0.5
    first = (centre - 2 * factor).floor().long() + 1
    taps = first[:, None] + torch.arange(4 * factor)
    distance = ((taps - centre[:, None]) / factor).abs()
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weight = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))
    weight = weight / weight.sum(1, keepdim=True)
    inside = taps % (2 * size)  # mirrored with the last pixel twice
    inside = torch.where(inside < size, inside, 2 * size - 1 - inside)
    return torch.zeros(size // factor, size, dtype=torch.float64).scatter_add_(1, inside, weight)


class BicubicDownsampling(LinearOperator):
    """Bicubic reduction of images (B, C, H, W) with antialiasing, as two small matrices: A x = R x C^T.

    Args:
        size: Height and width of the large images, multiples of the factor.
        factor: How many times smaller each side becomes.
        inverse: ``exact``: the true pseudo-inverse, out of the singular values of the two matrices; ``scaled_adjoint``: A^T y factor^2,
            which FLAIR begins with, and which is softer.

    Raises:
        ValueError: The factor doesn't divide the size, or an image has another size.
    """

    rows: Tensor
    columns: Tensor
    rows_inverse: Tensor
    columns_inverse: Tensor

    def __init__(self, size: Sequence[int], factor: int, inverse: Literal["exact", "scaled_adjoint"] = "exact") -> None:
        super().__init__()
        checks.literals(BicubicDownsampling, locals())
        self.size, self.factor, self.inverse = tuple(size), factor, inverse
        for name, side in zip(("rows", "columns"), self.size, strict=True):
            matrix = bicubic_matrix(side, factor)
            self.register_buffer(name, matrix, persistent=False)
            # wide matrices of full rank or nearly so: singular values below 1e-6 of the largest count as 0
            self.register_buffer(f"{name}_inverse", torch.linalg.pinv(matrix, rtol=1e-6), persistent=False)

    def _apply_both(self, left: Tensor, x: Tensor, right: Tensor) -> Tensor:
        if x.shape[-2:] != (left.shape[1], right.shape[1]):
            expected, given = (left.shape[1], right.shape[1]), tuple(x.shape[-2:])
            raise ValueError(f"BicubicDownsampling of size={self.size} got images of {given}, expected {expected}: make one for your size")
        return left.to(x) @ x @ right.to(x).T

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply_both(self.rows, x, self.columns)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply_both(self.rows.T, y, self.columns.T)

    def _pseudo_inverse(self, y: Tensor) -> Tensor:
        if self.inverse == "scaled_adjoint":
            return self._adjoint(y) * self.factor**2
        return self._apply_both(self.rows_inverse, y, self.columns_inverse)


class Inpainting(LinearOperator):
    """Keeps the observed pixels of images (B, C, H, W).

    Args:
        mask: (H, W) or (C, H, W), true where observed; one of (H, W) holds for all channels.
        flat: y has the observed values alone, (B, observed), channel after channel; false: y is the image, with zeros elsewhere.

    Raises:
        ValueError: The mask is neither a matrix nor three-dimensional, or images don't fit it.
    """

    mask: Tensor
    places: Tensor

    def __init__(self, mask: Tensor, flat: bool = True) -> None:
        super().__init__()
        if mask.ndim not in (2, 3):
            raise ValueError(f"mask is {tuple(mask.shape)}: give one of (height, width) or (channels, height, width), true where observed")
        self.flat = flat
        self.register_buffer("mask", mask.detach() != 0, persistent=False)
        self.register_buffer("places", self.mask.flatten().nonzero()[:, 0], persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[-self.mask.ndim :] != self.mask.shape:
            given, expected = tuple(x.shape), tuple(self.mask.shape)
            raise ValueError(f"Inpainting with a mask of {expected} got images {given}, expected (batch, channels, height, width)")
        if not self.flat:
            return x * self.mask.to(x.device)
        return x.flatten(-self.mask.ndim).index_select(-1, self.places.to(x.device)).reshape(len(x), -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        if not self.flat:
            return y * self.mask.to(y.device)
        if y.ndim != 2 or (y.shape[1] % len(self.places) if len(self.places) else y.shape[1]):
            raise ValueError(f"Inpainting got y {tuple(y.shape)}, expected (batch, channels x {len(self.places)} observed pixels)")
        rows = y.reshape(len(y), -1, len(self.places)) if len(self.places) else y.reshape(len(y), 1, 0)
        image = rows.new_zeros(*rows.shape[:2], self.mask.numel()).index_copy(-1, self.places.to(y.device), rows)
        return image.reshape(len(y), *image.shape[1 : 4 - self.mask.ndim], *self.mask.shape)

    def _pseudo_inverse(self, y: Tensor) -> Tensor:
        return self._adjoint(y)


class RandomProjection(LinearOperator):
    """y = G x with a matrix of independent N(0, 1/rows) numbers, x flattened.

    Args:
        shape: Of a sample, such as (C, H, W).
        rows: Measurements, >= 1.
        seed: Of the matrix.

    Raises:
        ValueError: A sample has another shape.
    """

    matrix: Tensor
    inverse: Tensor

    def __init__(self, shape: Sequence[int], rows: int, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(1, rows=rows)
        self.shape = tuple(shape)
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(rows, math.prod(self.shape), generator=generator, dtype=torch.float64) / math.sqrt(rows)
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(matrix), persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"RandomProjection of {self.shape} got samples of {tuple(x.shape[1:])}: make one for your shape")
        return x.flatten(1) @ self.matrix.to(x).T

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y)).reshape(-1, *self.shape)

    def _pseudo_inverse(self, y: Tensor) -> Tensor:
        return (y @ self.inverse.to(y).T).reshape(-1, *self.shape)


# ---- other people's operators -----------------------------------------------------------------------------------------------------------


class Physics(LinearOperator):
    """An operator of deepinv, or of anybody with its ``A`` and ``A_adjoint``, as one of ours.

    Args:
        physics: Object with ``A(x)`` and ``A_adjoint(y)``; its ``A_dagger(y)`` is the pseudo-inverse where there is one.
        iterations: Conjugate gradient iterations where there is none.
    """

    def __init__(self, physics: Any, iterations: int = 50) -> None:
        super().__init__(iterations)
        self.physics = physics  # a module moves with this one

    def _forward(self, x: Tensor) -> Tensor:
        return self.physics.A(x)  # type: ignore[no-any-return]

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y)  # type: ignore[no-any-return]

    def _pseudo_inverse(self, y: Tensor) -> Tensor:
        dagger = getattr(self.physics, "A_dagger", None)
        return super()._pseudo_inverse(y) if dagger is None else dagger(y)


def as_operator(given: Any) -> LinearOperator:
    """An operator as it is, or a wrapped one of deepinv.

    Args:
        given: A :class:`LinearOperator`, or an object with ``A`` and ``A_adjoint``.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(given, LinearOperator):
        return given
    if callable(getattr(given, "A", None)) and callable(getattr(given, "A_adjoint", None)):
        return Physics(given)
    raise TypeError(f"{type(given).__name__} is no linear operator: give a LinearOperator, or an object with A(x) and A_adjoint(y)")


def to_deepinv(operator: LinearOperator) -> Any:
    """The operator as a ``deepinv.physics.LinearPhysics``, for their solvers and losses.

    Raises:
        ImportError: deepinv isn't installed.
    """
    try:
        from deepinv.physics import LinearPhysics
    except ImportError as error:
        raise ImportError("to_deepinv needs deepinv: pip install 'lit-methods[peers]'") from error

    class Ours(LinearPhysics):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.operator = operator

        def A(self, x: Tensor, **_: Any) -> Tensor:
            return self.operator.forward(x)

        def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
            return self.operator.adjoint(y)

        def A_dagger(self, y: Tensor, **_: Any) -> Tensor:
            return self.operator.pseudo_inverse(y)

    return Ours()


# ---- what holds for all -----------------------------------------------------------------------------------------------------------------


def check_adjoint(operator: Any, x: Tensor, rtol: float = 1e-4, generator: torch.Generator | None = None) -> None:
    """Raise unless <A x, y> = <x, A^T y> for a random x and y.

    Args:
        operator: Ours or deepinv's.
        x: A batch whose shape, dtype and device are taken; its values aren't looked at. With float64 use a smaller ``rtol``.
        rtol: Allowed difference, relative to |A x| |y|.
        generator: Source of x and y on x's device; None: one with a fixed seed.

    Raises:
        ValueError: The adjoint isn't one.
    """
    operator = as_operator(operator)
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    x = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    image = operator.forward(x)
    y = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=x.device)
    back = operator.adjoint(y)
    name = type(getattr(operator, "physics", operator)).__name__
    if back.shape != x.shape:
        raise ValueError(f"{name}'s adjoint maps to {tuple(back.shape)}, but its forward takes {tuple(x.shape)}: correct A_adjoint")
    forward, adjoint = (float(_inner(a, b).sum()) for a, b in ((image, y), (x, back)))
    scale = float(image.norm() * y.norm())
    if not abs(forward - adjoint) <= rtol * scale:
        raise ValueError(
            f"{name} fails the adjoint test: <A x, y> = {forward:.6g}, <x, A^T y> = {adjoint:.6g}, a difference of "
            f"{abs(forward - adjoint) / max(scale, 1e-30):.1e} of |A x| |y|, allowed {rtol:.0e}: correct its adjoint, or its scale"
        )


def squared_norm(operator: LinearOperator, x: Tensor, iterations: int = 30) -> Tensor:
    """Largest eigenvalue of A^T A, a scalar, by power iterations; x is a batch whose shape, dtype and device are taken."""
    generator = torch.Generator(x.device).manual_seed(0)
    vector = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        vector = vector / torch.linalg.vector_norm(vector).clamp(min=1e-30)
        image = operator.forward(vector)
        vector = operator.adjoint(image)
    return image.abs().square().sum()


__all__ = [
    "BicubicDownsampling",
    "Blur",
    "Composition",
    "Inpainting",
    "LinearOperator",
    "Physics",
    "RandomProjection",
    "as_operator",
    "bicubic_matrix",
    "check_adjoint",
    "gaussian_kernel",
    "least_squares",
    "motion_kernel",
    "precise",
    "squared_norm",
    "to_deepinv",
]
