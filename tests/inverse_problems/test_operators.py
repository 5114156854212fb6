"""Linear operators: adjoints, pseudo-inverses, composition, precision, and deepinv's operators in both directions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.inverse_problems import mri
from lit_methods.inverse_problems.masks import described, make_mask
from lit_methods.inverse_problems.operators import (
    BicubicDownsampling,
    Blur,
    Inpainting,
    LinearOperator,
    RandomProjection,
    as_operator,
    bicubic_matrix,
    check_adjoint,
    gaussian_kernel,
    motion_kernel,
    squared_norm,
    to_deepinv,
)

SHAPE = (2, 3, 12, 9)
MRI_SHAPE = (2, 8, 10, 2)


def kernel(height: int, width: int) -> Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(height), dtype=torch.float64)


def scan(fourier: mri.Fourier = mri.CENTERED, coils: int = 3) -> mri.MultiCoilMRI:
    generator = torch.Generator().manual_seed(4)
    maps = mri.normalise_maps(torch.randn(2, coils, 8, 10, 2, generator=generator, dtype=torch.float64))
    mask = torch.rand(1, 1, 8, 10, 1, generator=generator) < 0.5
    return mri.MultiCoilMRI(maps, mask, fourier, iterations=200)


CENTRED_KERNEL = F.pad(torch.full((1, 1), 8.0), (1, 0, 2, 1)) + kernel(4, 2)  # well conditioned
MASK = torch.rand(12, 9, generator=torch.Generator().manual_seed(1)) < 0.4
OPERATORS: dict[str, tuple[LinearOperator, tuple[int, ...]]] = {
    "blur": (Blur(kernel(3, 3)), SHAPE),
    "blur of an even kernel": (Blur(kernel(4, 2)), SHAPE),
    "blur that loses a frequency": (Blur(torch.ones(3, 3) / 9), SHAPE),
    "blur with zeros": (Blur(kernel(3, 5), padding="zeros", iterations=600), SHAPE),
    "blur of an even kernel with zeros": (
        Blur(CENTRED_KERNEL, padding="zeros", iterations=600),
        SHAPE,
    ),
    "bicubic": (BicubicDownsampling((12, 9), 3), SHAPE),
    "bicubic 1": (BicubicDownsampling((12, 9), 1), SHAPE),
    "inpainting": (Inpainting(MASK), SHAPE),
    "inpainting by channels": (Inpainting(torch.stack([MASK, ~MASK, MASK])), SHAPE),
    "inpainting, whole": (Inpainting(MASK, flat=False), SHAPE),
    "inpainting of nothing": (Inpainting(torch.ones(12, 9)), SHAPE),
    "projection": (RandomProjection(SHAPE[1:], 40), SHAPE),
    "projection to more": (RandomProjection((2, 4), 12), (3, 2, 4)),
    "mri": (scan(), MRI_SHAPE),
    "mri, not centred": (scan(mri.Fourier(False, "backward")), MRI_SHAPE),
    "mri, forward": (scan(mri.Fourier(True, "forward")), MRI_SHAPE),
    "composition": (BicubicDownsampling((12, 9), 3) @ Blur(gaussian_kernel(5, 1.0)), SHAPE),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_and_pseudo_inverse(name: str) -> None:
    """The adjoint, all four equations of Moore and Penrose, and single precision under autocast."""
    operator, shape = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    x, x2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    check_adjoint(operator, x, rtol=1e-12)
    y, a, inverse = operator(x), operator.forward, operator.pseudo_inverse
    near = {"rtol": 1e-5, "atol": 1e-6 * float(y.abs().max())}
    torch.testing.assert_close(a(inverse(y)), y, **near)
    torch.testing.assert_close(inverse(a(inverse(y))), inverse(y), **near)
    z = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((a(inverse(y)) * z).sum(), (y * a(inverse(z))).sum(), rtol=1e-4, atol=1e-4)  # A A+ is symmetric
    torch.testing.assert_close((inverse(a(x)) * x2).sum(), (x * inverse(a(x2))).sum(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = operator(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, y.float(), rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    assert operator(x.bfloat16()).dtype == torch.float32
    assert not operator.state_dict()


def test_blur_is_a_convolution() -> None:
    """The middle of an odd and of an even kernel stays where it is, with both paddings."""
    for size in ((3, 3), (4, 2)):
        weights, x = kernel(*size), torch.zeros(1, 1, 12, 9, dtype=torch.float64)
        x[0, 0, 6, 4] = 1.0
        for padding in ("circular", "zeros"):
            found = Blur(weights, padding=padding)(x)[0, 0]  # type: ignore[arg-type]
            top, left = 6 - size[0] // 2, 4 - size[1] // 2
            torch.testing.assert_close(found[top : top + size[0], left : left + size[1]], weights)
            torch.testing.assert_close(found.sum(), weights.sum())


def test_bicubic_keeps_constants_and_lines() -> None:
    """Rows sum to 1; in the inside a straight line is reduced to its values at the middles."""
    matrix = bicubic_matrix(32, 4)
    torch.testing.assert_close(matrix.sum(1), torch.ones(8, dtype=torch.float64))
    line = torch.arange(32, dtype=torch.float64)
    torch.testing.assert_close((matrix @ line)[2:-2], ((torch.arange(8) + 0.5) * 4 - 0.5).double()[2:-2])
    operator = BicubicDownsampling((8, 8), 2, inverse="scaled_adjoint")
    y = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(operator.pseudo_inverse(y), operator.adjoint(y) * 4)


def test_projection_and_norm() -> None:
    """Seeds make the matrix; the norm is that of the singular values."""
    first, second = RandomProjection((5,), 4, seed=1), RandomProjection((5,), 4, seed=2)
    assert not torch.equal(first.matrix, second.matrix)
    assert torch.equal(first.matrix, RandomProjection((5,), 4, seed=1).matrix)
    norm = squared_norm(first, torch.zeros(1, 5, dtype=torch.float64), iterations=300)
    torch.testing.assert_close(norm, torch.linalg.svdvals(first.matrix)[0] ** 2)
    path = motion_kernel(9, torch.Generator().manual_seed(0))
    assert path.shape == (9, 9)
    assert float(path.min()) >= 0
    torch.testing.assert_close(path.sum(), torch.tensor(1.0, dtype=torch.float64))


class Wrong(LinearOperator):
    """Its adjoint has another scale."""

    def _forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def _adjoint(self, y: Tensor) -> Tensor:
        return y


class Foreign:
    """What has ``A`` and ``A_adjoint`` alone."""

    def A(self, x: Tensor) -> Tensor:
        return 2 * x

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 2 * y


def test_foreign_operators_and_refusals() -> None:
    x = torch.rand(1, 2, 4, 4)
    operator = as_operator(Foreign())
    check_adjoint(operator, x)
    torch.testing.assert_close(operator.pseudo_inverse(operator(x)), x)
    torch.testing.assert_close((Blur(gaussian_kernel(3, 1.0)) @ operator)(x), 2 * Blur(gaussian_kernel(3, 1.0))(x))
    with pytest.raises(ValueError, match="Wrong fails the adjoint test"):
        check_adjoint(Wrong(), x)
    with pytest.raises(TypeError, match="int is no linear operator"):
        as_operator(3)
    with pytest.raises(ValueError, match="smaller than the blur's kernel"):
        Blur(torch.ones(5, 5))(x)
    with pytest.raises(ValueError, match="can't be reduced by 3"):
        BicubicDownsampling((4, 4), 3)
    with pytest.raises(ValueError, match="make one for your size"):
        BicubicDownsampling((8, 8), 2)(x)
    with pytest.raises(ValueError, match="with a mask of"):
        Inpainting(torch.ones(3, 3))(x)
    with pytest.raises(ValueError, match="RandomProjection of"):
        RandomProjection((2, 3), 4)(x)


def test_mri_shapes_are_checked() -> None:
    kspace, mask = torch.zeros(2, 3, 4, 4, 2), torch.ones(1, 1, 4, 4, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="coil maps are"):
        mri.check_shapes(kspace, kspace[:, :2], mask)
    with pytest.raises(ValueError, match="mask is"):
        mri.check_shapes(kspace, kspace, mask[..., :3, :])
    with pytest.raises(ValueError, match="real and imaginary part last"):
        mri.check_shapes(kspace[..., 0], kspace, mask)
    with pytest.raises(ValueError, match="isn't centred"):
        mri.estimate_maps(kspace, 4, mri.Fourier(False))


def test_fourier_is_numpys() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 7, 6)) + 1j * rng.normal(size=(2, 7, 6))
    x = torch.view_as_real(torch.from_numpy(z))
    centred = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(z, (1, 2)), norm="ortho"), (1, 2))
    np.testing.assert_allclose(torch.view_as_complex(mri.fft2c(x)).numpy(), centred)
    np.testing.assert_allclose(torch.view_as_complex(mri.fft2c(x, mri.Fourier(False, "backward"))).numpy(), np.fft.fft2(z))
    torch.testing.assert_close(mri.ifft2c(mri.fft2c(x)), x)
    assert mri.fft2c(x.half()).dtype == torch.float32


def test_maps_from_the_middle_of_kspace() -> None:
    """Smooth coils are found again, up to the image's phase."""
    grid = torch.linspace(-1, 1, 32, dtype=torch.float64)
    away = (grid[:, None, None] - torch.tensor([-1.0, -1, 1, 1])) ** 2 + (grid[:, None] - torch.tensor([-1.0, 1, -1, 1])) ** 2
    coils = torch.exp(-away / 2).permute(2, 0, 1)[None]
    maps = mri.normalise_maps(torch.stack([coils, torch.zeros_like(coils)], -1))
    image = torch.stack([torch.ones(1, 32, 32), torch.zeros(1, 32, 32)], -1).double()
    found = mri.estimate_maps(mri.fft2c(mri.sense_expand(image, maps)), 16)
    torch.testing.assert_close(found[:, :, 4:-4, 4:-4], maps[:, :, 4:-4, 4:-4], rtol=0, atol=0.08)
    torch.testing.assert_close(found.square().sum((1, -1)), torch.ones(1, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["gaussian_2d", "gaussian_1d", "poisson", "equispaced", "random"])
def test_masks(kind: str) -> None:
    """As many samples as the acceleration says, the middle always, whole columns or not, the same again with the same chance."""
    shape, centre = (64, 48), 0.08
    masks = [make_mask(kind, shape, 4, centre, np.random.default_rng(seed)) for seed in (0, 1, 0)]  # type: ignore[arg-type]
    assert np.array_equal(masks[0], masks[2])
    assert not np.array_equal(masks[0], masks[1])
    assert described(masks[0]) == ("2-D" if kind in ("gaussian_2d", "poisson") else "1-D")
    shares = np.mean([make_mask(kind, shape, 4, centre, np.random.default_rng(seed)).mean() for seed in range(8)])  # type: ignore[arg-type]
    assert 0.22 <= shares <= 0.34  # the middle comes on top where the paper puts it there
    assert all(mask[30:35, 23:26].all() for mask in masks)
    if kind == "poisson":  # denser inside, and neighbours are rare outside
        assert masks[0][16:48, 12:36].mean() > 1.5 * masks[0][:8].mean()
        assert (masks[0][:8, 1:] & masks[0][:8, :-1]).mean() < 0.02
    assert make_mask(kind, shape, 1, 0.0, np.random.default_rng(0)).all()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="acceleration is 0"):
        make_mask(kind, shape, 0.5, centre, np.random.default_rng(0))  # type: ignore[arg-type]


# ---- deepinv ----------------------------------------------------------------------------------------------------------------------------


def test_deepinv_takes_ours_and_ours_takes_deepinvs() -> None:
    """The same masks, blurs and coils give the same numbers in both, and their solver runs on ours."""
    deepinv = pytest.importorskip("deepinv", reason="deepinv isn't installed: pip install 'lit-methods[peers]'")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(SHAPE, generator=generator)
    weights = kernel(3, 3).float()
    theirs = deepinv.physics.Blur(filter=weights[None, None], padding="circular")
    check_adjoint(theirs, x)
    torch.testing.assert_close(as_operator(theirs)(x), Blur(weights)(x), rtol=1e-4, atol=1e-5)
    masked = deepinv.physics.Inpainting(img_size=SHAPE[1:], mask=MASK[None].float().expand(3, -1, -1))
    torch.testing.assert_close(as_operator(masked)(x), Inpainting(MASK, flat=False)(x))
    torch.testing.assert_close(as_operator(masked).pseudo_inverse(x), Inpainting(MASK, flat=False).pseudo_inverse(x))

    ours = scan()
    maps = torch.view_as_complex(ours.maps.float())
    mask = ours.mask[:, 0, ..., 0].float()
    multi = deepinv.physics.MultiCoilMRI(mask=mask, coil_maps=maps, img_size=(2, 8, 10))
    image = torch.rand(MRI_SHAPE, generator=generator)
    torch.testing.assert_close(multi.A(image.permute(0, 3, 1, 2)), ours(image).permute(0, 4, 1, 2, 3), rtol=1e-4, atol=1e-5)
    kspace = ours(image)
    back = multi.A_adjoint(kspace.permute(0, 4, 1, 2, 3))
    torch.testing.assert_close(back.permute(0, 2, 3, 1), ours.adjoint(kspace), rtol=1e-4, atol=1e-5)

    physics = to_deepinv(Blur(gaussian_kernel(3, 0.6)))
    y = physics.A(x)
    torch.testing.assert_close(physics.A_dagger(y), x, rtol=1e-3, atol=1e-3)
    assert float(physics.adjointness_test(x).abs()) < 1e-2
    gradient = deepinv.optim.data_fidelity.L2().grad(torch.zeros_like(x), y, physics)
    torch.testing.assert_close(gradient, -physics.A_adjoint(y), rtol=1e-4, atol=1e-5)


# ---- what is kept between calls ---------------------------------------------------------------------------------------------------------


def test_a_blur_knows_when_its_transfer_function_is_another() -> None:
    blur, generator = Blur(kernel(5, 3)), torch.Generator().manual_seed(0)
    images = [
        torch.randn(1, 1, *size, generator=generator, dtype=dtype) for size, dtype in (((9, 8), torch.float64), ((8, 9), torch.float32))
    ]
    with torch.inference_mode():
        first = blur(images[0])
    for image in (*images, *images):
        torch.testing.assert_close(blur(image), Blur(kernel(5, 3))(image), rtol=0, atol=0)
    torch.testing.assert_close(first, blur(images[0]), rtol=0, atol=0)
    leaf = images[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad((blur(leaf) * images[0]).sum(), leaf)
    torch.testing.assert_close(slope, blur.adjoint(images[0]))
    blur.kernel.mul_(2)
    torch.testing.assert_close(blur(images[0]), 2 * first)
    assert not blur.state_dict()


@pytest.mark.parametrize("size", [(8, 10), (6, 8), (7, 10), (8, 5)])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("normalization", ["ortho", "backward", "forward"])
def test_coils_with_signs_are_coils_with_shifts(size: tuple[int, int], centered: bool, normalization: mri.Normalization) -> None:
    generator, fourier = torch.Generator().manual_seed(0), mri.Fourier(centered, normalization)
    maps = mri.normalise_maps(torch.randn(2, 3, *size, 2, generator=generator, dtype=torch.float64))
    mask = torch.rand(2, 1, *size, 1, generator=generator) < 0.5
    x = torch.randn(2, *size, 2, generator=generator, dtype=torch.float64)
    operator = mri.MultiCoilMRI(maps, mask, fourier)
    y = operator(x)
    torch.testing.assert_close(y, mask * mri.fft2c(mri.sense_expand(x, maps), fourier), rtol=1e-12, atol=1e-12)
    scale = {"ortho": 1.0, "backward": float(size[0] * size[1]), "forward": 1.0 / (size[0] * size[1])}[normalization]
    noisy = y + torch.randn(y.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(operator.adjoint(noisy), scale * mri.sense_combine(mask * noisy, maps, fourier), rtol=1e-12, atol=1e-12)
    operator.mask.fill_(True)
    torch.testing.assert_close(operator(x), mri.fft2c(mri.sense_expand(x, maps), fourier), rtol=1e-12, atol=1e-12)
