"""FLAIR: its maths by other ways, noise that follows images, a folder that is taken up again, two processes, and mistakes."""

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import run_two_processes, tiny_trainer
from lit_methods import (
    FLAIR,
    BicubicDownsampling,
    BoxInpainting,
    DigitFeatures,
    FlowInverseSolver,
    GaussianMixtureFlow,
    GaussianSmoothing,
    LatentFlow,
    MaskFileInpainting,
    MotionBlur,
    RandomProjection,
    ScatteredInpainting,
    SmallUNet,
    TinyAutoencoder,
)
from lit_methods.datamodules import MixtureDataModule, RestorationDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.fake import picture
from lit_methods.inverse_problems.flair.core import (
    FlairSettings,
    Problem,
    alpha_at,
    calibrated_weights,
    fit_data,
    flair_solve,
    largest_pull,
    nearest_time,
    regulariser_step,
    time_grid,
)

FAST = FlairSettings(steps=6, lr_data=0.5, data_steps=4)


def solver(settings: FlairSettings = FAST, prior: Any = None, operator: Any = None, **words: Any) -> FlowInverseSolver:
    words = {"weighting": "linear", "regularizer_weight": None} | words
    return FlowInverseSolver(prior or GaussianMixtureFlow(), operator or ScatteredInpainting([4, 4], 6), settings, **words)


def draws(count: int = 8, **words: Any) -> Tensor:
    data = MixtureDataModule(**words)
    data.setup("test")
    images: Tensor = data.test_set.images[:count]
    return images


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_weights_are_the_inverse_error_with_mean_one_and_the_first_of_two_times_is_nearest() -> None:
    error = torch.tensor([0.5, float("nan"), 0.25, 1.0], dtype=torch.float64)
    weights = calibrated_weights(error, 0.0, 1.0)
    assert weights.isnan().tolist() == [False, True, False, False]
    assert weights.nansum() == pytest.approx(4.0)
    assert float(weights[2] / weights[0]) == pytest.approx(2.0, rel=1e-5)
    assert calibrated_weights(error, None, 1.0)[-1] == 0
    assert (calibrated_weights(error, -2.0, 1.0).nan_to_num() >= 0).all()
    assert nearest_time(torch.tensor([0.5, 1.0, 0.0]), 2).tolist() == [0, 0, 1]
    assert largest_pull(torch.linspace(1, 0, 11) * 0.8) == pytest.approx(0.8)
    grid = time_grid(3, 0.2)
    torch.testing.assert_close(grid, torch.tensor([0.8, 0.6, 0.4], dtype=torch.float64))


def test_alpha_grows_from_fresh_to_kept_noise() -> None:
    from typing import get_args

    from lit_methods.inverse_problems.flair.core import Alpha

    assert all(0 <= alpha_at(t, mode) <= 1 for mode in get_args(Alpha) for t in (0.0, 0.3, 1.0))
    assert [alpha_at(t) for t in (1.0, 0.75, 0.25)] == [0.0, 0.25, 0.75]
    with pytest.raises(ValueError, match="alpha is 'linear': give one of"):
        alpha_at(0.5, "linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha is 'linear'"):
        FlairSettings(alpha="linear")  # type: ignore[arg-type]


def test_the_modes_are_one_direction_of_three_lengths_towards_the_clean_prediction() -> None:
    prior, mu = GaussianMixtureFlow(), torch.randn(3, 1, 4, 4).double()
    noise, t = torch.randn_like(mu), 0.4

    def velocity(x: Tensor, time: float) -> Tensor:
        return prior.velocity(x, torch.full((3,), time).double())

    found = {mode: regulariser_step(mu, noise, noise, t, velocity, 0.7, "none", mode) for mode in ("v", "sigma", "sigma2")}  # type: ignore[arg-type]
    v = found["v"]
    torch.testing.assert_close(found["sigma"].direction, (1 - t) * v.direction)
    torch.testing.assert_close(found["sigma2"].direction, t * v.direction)
    torch.testing.assert_close(v.direction, 0.7 * (mu - (v.x_t - t * v.velocity)) / t)


def test_the_mixtures_velocity_is_that_of_its_score() -> None:
    prior, t = GaussianMixtureFlow(components=3, std=0.3), 0.35
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    scale = ((1 - t) ** 2 * 0.3**2 + t**2) ** 0.5
    parts = torch.distributions.Independent(torch.distributions.Normal((1 - t) * prior.means, scale), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(3, dtype=torch.float64)), parts)
    (score,) = torch.autograd.grad(mixture.log_prob(x.flatten(1)).sum(), x)
    x1 = -t * score  # Tweedie
    x0 = (x - t * x1) / (1 - t)
    torch.testing.assert_close(prior.velocity(x, torch.full((5,), t).double()), x1 - x0)


def test_data_steps_stop_for_each_sample_by_itself() -> None:
    y, mu = torch.zeros(3, 4), torch.tensor([[0.0] * 4, [0.01] * 4, [1.0] * 4])
    found = fit_data(mu, y, lambda x: x, 1.0, 0.25, steps=3, tolerance=1e-3)
    assert found.steps.tolist() == [0, 0, 3]
    assert torch.equal(found.mu[1], mu[1])
    torch.testing.assert_close(found.mu[2], mu[2] * 0.5**3)
    torch.testing.assert_close(found.after, found.mu.square().sum(1))
    assert torch.equal(fit_data(mu, y, lambda x: x, 1.0, 0.25, steps=0).mu, mu)
    assert len(fit_data(mu[:0], y[:0], lambda x: x, 1.0, 0.25).after) == 0


def test_no_weight_no_update_and_the_projection_needs_a_problem_that_has_one() -> None:
    problem = Problem(torch.zeros(2, 4), lambda x, t: x, lambda x: x)
    mu = torch.ones(2, 4)
    assert torch.equal(flair_solve(problem, mu, lambda number: mu, [0.0] * 6, FAST), mu)
    with pytest.raises(ValueError, match="needs a problem with project"):
        flair_solve(problem, mu, lambda number: mu, [0.0] * 6, FlairSettings(steps=6, lr_projection=0.1))
    moved = solver(FlairSettings(steps=6, lr_data=0.5, lr_projection=0.5), start="noise")
    still = solver(FlairSettings(steps=6, lr_data=0.5), start="noise")
    y = moved.measure(draws(2), [0, 1], 0.01, False)
    assert not torch.equal(moved.restore(y, [0, 1]).images, still.restore(y, [0, 1]).images)


# ---- the solver ------------------------------------------------------------------------------------------------------------------------


def test_an_image_is_restored_alike_in_any_batch() -> None:
    one, clean = solver(), draws(3)
    numbers = [7, 2, 9]
    together = one.restore(one.measure(clean, numbers, 0.01, False), numbers).images
    for place, number in enumerate(numbers):
        alone = one.restore(one.measure(clean[place : place + 1], [number], 0.01, False), [number]).images
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-5)
    other = one.restore(one.measure(clean, [1, 2, 9], 0.01, False), [1, 2, 9]).images
    assert not torch.equal(other[0], together[0])


@pytest.mark.parametrize("method", ["flair", "red_diff", "flow_dps", "flow_chef", "dps"])
def test_every_method_comes_nearer_than_its_start(method: Any) -> None:
    settings = FlairSettings(steps=25, lr_data=0.3, data_steps=4)
    one, clean = solver(settings, method=method), draws(8)
    found = one.restore(one.measure(clean, list(range(8)), 0.01, False), list(range(8)))
    before, after = ((images - clean).square().sum() for images in (found.start, found.images))
    assert after < 0.9 * before
    assert len(found.traces) == 25
    assert found.traces[-1].gap.isnan().all() == (method not in ("flair", "red_diff"))


def test_the_model_may_be_bf16_and_mu_stays_float32() -> None:
    prior = LatentFlow(SmallUNet(1, 8, (1,)).to(torch.bfloat16))
    one = solver(prior=prior, operator=BoxInpainting([8, 8]))
    found = one.restore(one.measure(torch.zeros(2, 1, 8, 8), [0, 1], 0.01, False), [0, 1])
    assert found.images.dtype == torch.float32
    assert found.traces[0].mu.dtype == torch.float32
    assert found.images.isfinite().all()


@pytest.mark.parametrize("inference_mode", [True, False])
def test_gradients_are_there_in_either_mode_of_a_trainer(inference_mode: bool) -> None:
    module = FLAIR(GaussianMixtureFlow(), ScatteredInpainting([4, 4], 6), FAST, weighting="linear")
    (figures,) = tiny_trainer(inference_mode=inference_mode).test(module, MixtureDataModule(num_test=8), verbose=False)
    assert figures["flair/test_error"] < figures["flair/test_start_error"]
    assert "flair/test_ssim" not in figures


def test_an_operator_of_another_library_is_taken() -> None:
    class Halved:
        def A(self, x: Tensor, **_: Any) -> Tensor:
            return x / 2

        def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
            return y / 2

    one, clean = solver(operator=Halved()), draws(2)
    found = one.restore(one.measure(clean, [0, 1], 0.0, False), [0, 1])
    torch.testing.assert_close(found.start, clean)


# ---- runs ------------------------------------------------------------------------------------------------------------------------------


def _module(**words: Any) -> FLAIR:
    torch.manual_seed(0)
    return FLAIR(GaussianMixtureFlow(), ScatteredInpainting([4, 4], 6), FAST, calibration_times=6, regularizer_weight=None, **words)


def _calibrate_and_test(devices: int) -> tuple[Tensor, dict[str, float]]:
    data = MixtureDataModule(num_train=8, num_val=24, num_test=10, batch_size=4)
    words: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if devices == 2 else {}
    module = _module(val_images=6)
    tiny_trainer(max_epochs=1, **words).fit(module, datamodule=data)
    (figures,) = tiny_trainer(**words).test(module, data, verbose=False)
    return module.solver.error.clone(), {name: value for name, value in figures.items() if "seconds" not in name}


def test_two_processes_calibrate_and_restore_like_one() -> None:
    curve, figures = _calibrate_and_test(1)
    assert curve.all()
    for theirs, found in run_two_processes(_calibrate_and_test, 2):
        torch.testing.assert_close(theirs, curve)
        assert found == pytest.approx(figures, rel=1e-4)


def test_a_checkpoint_has_the_curve_and_without_one_nothing_is_restored(tmp_path: Path) -> None:
    data, module = MixtureDataModule(num_val=8, num_test=4), _module()
    with pytest.raises(ValueError, match="aren't calibrated: give --ckpt_path"):
        tiny_trainer().test(module, data, verbose=False)
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = _module()
    tiny_trainer().test(other, data, ckpt_path=tmp_path / "one.ckpt", verbose=False, weights_only=True)
    assert torch.equal(other.solver.error, module.solver.error)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        picture(tmp_path / "photos" / f"{name}.png", rng.integers(0, 256, (20, 24), dtype=np.uint8))
    return tmp_path / "photos"


def _predict(photos: Path, output: Path, limit: int = 9, seed: int = 0, **words: Any) -> list[Any]:
    torch.manual_seed(0)
    prior = LatentFlow(SmallUNet(1, 8, (1,)))
    module = FLAIR(prior, BoxInpainting([16, 16]), FAST, weighting="linear", output=output, seed=seed, **words)
    data = RestorationDataModule(photos, grey=True, eval_batch_size=1)
    return tiny_trainer(limit_predict_batches=limit).predict(module, data) or []


def test_a_folder_is_restored_and_taken_up_where_it_was_left(photos: Path, tmp_path: Path) -> None:
    assert len(_predict(photos, tmp_path / "whole")) == 3
    _predict(photos, tmp_path / "parts", limit=1)
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["a.png", "table.csv"]
    (tmp_path / "parts" / ".b.png.1-0.tmp").write_bytes(b"half")  # of a process that was killed while it wrote
    rest = _predict(photos, tmp_path / "parts")
    assert [part["name"] for part in rest] == [[], ["b"], ["c"]]
    from PIL import Image

    for name in ("a", "b", "c"):
        first, second = (np.asarray(Image.open(tmp_path / folder / f"{name}.png")) for folder in ("whole", "parts"))
        assert first.shape == (16, 16)
        assert np.array_equal(first, second)
    rows = list(csv.DictReader((tmp_path / "parts" / "table.csv").open()))
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert all(float(row["psnr"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    with pytest.raises(ValueError, match=r"has a a.png of another run or other settings"):
        _predict(photos, tmp_path / "parts", seed=1)
    shutil.copy(photos / "a.png", tmp_path / "whole" / "a.png")
    with pytest.raises(ValueError, match="give an empty folder"):
        _predict(photos, tmp_path / "whole")


@pytest.mark.parametrize("method", ["red_diff", "flow_dps", "flow_chef", "dps"])
def test_baselines_restore_a_folder(method: Any, photos: Path, tmp_path: Path) -> None:
    found = _predict(photos, tmp_path / "out", method=method)
    assert [part["name"] for part in found] == [["a"], ["b"], ["c"]]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png", "table.csv"]
    assert [part["name"] for part in _predict(photos, tmp_path / "out", method=method)] == [[], [], []]
    with pytest.raises(ValueError, match="other settings"):
        _predict(photos, tmp_path / "out", method="flair")


class Told(LatentFlow):
    """Notes which images it is asked about."""

    def about(self, names: Any) -> None:
        self.names, self.told = [*getattr(self, "names", []), list(names)], "two prompts"


def test_the_prior_knows_which_images_it_is_asked_about(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prior = Told(SmallUNet(1, 8, (1,)))
    module = FLAIR(prior, BoxInpainting([16, 16]), FAST, weighting="linear", output=tmp_path / "out")
    data = RestorationDataModule(photos, grey=True, eval_batch_size=2)
    tiny_trainer().predict(module, data)
    assert prior.names == [["a", "b"], ["a", "b"], ["c"], ["c"]], "when a batch is read, and when what isn't there yet is restored"
    (tmp_path / "out" / "a.png").unlink()
    prior.names = []
    tiny_trainer().predict(module, data)
    assert prior.names == [["a", "b"], ["a"], ["c"]]
    with pytest.raises(ValueError, match="other settings"):
        _predict(photos, tmp_path / "out")


def test_measurements_of_ones_own_are_restored(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = FLAIR(LatentFlow(SmallUNet(1, 8, (1,))), BicubicDownsampling([32, 32], 2), FAST, weighting="linear", degraded=True)
    module.output = tmp_path / "out"
    (found,) = tiny_trainer(limit_predict_batches=1).predict(module, RestorationDataModule(photos, grey=True, eval_batch_size=1))
    assert found["image"].shape == (1, 1, 32, 32)
    assert (tmp_path / "out" / "table.csv").read_text().startswith("name,residual,seconds")


def test_features_say_how_far_restored_images_are() -> None:
    torch.manual_seed(0)
    module = FLAIR(LatentFlow(SmallUNet(1, 8, (1,))), BoxInpainting([8, 8]), FAST, weighting="linear", features=DigitFeatures(steps=2))
    trainer = tiny_trainer(limit_test_batches=2)
    (figures,) = trainer.test(module, RestorationDataModule(image_size=8, eval_batch_size=4), verbose=False)
    assert figures["flair/test_frechet"] > 0
    assert not any("features" in name for name in module.state_dict())


# ---- data, autoencoder, operators --------------------------------------------------------------------------------------------------------


def test_folders_and_ways_to_fit(photos: Path, tmp_path: Path) -> None:
    sizes = {}
    for fit in ("resize", "crop", "whole"):
        data = RestorationDataModule(photos, image_size=8, fit=fit)  # type: ignore[arg-type]
        data.setup("test")
        sizes[fit] = tuple(next(iter(data.test_dataloader()))["image"].shape)
    assert sizes == {"resize": (3, 3, 8, 8), "crop": (3, 3, 8, 8), "whole": (1, 3, 16, 24)}
    data = RestorationDataModule(photos, image_size=32, fit="crop")
    data.setup("test")
    with pytest.raises(BrokenRecordError, match="pixels are fewer than image_size=32"):
        data.test_set[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(WrongRootError, match="holds no image files"):
        RestorationDataModule(tmp_path / "empty").setup("test")
    shutil.copytree(photos, tmp_path / "div2k" / "DIV2K_train_HR")
    data = RestorationDataModule(tmp_path / "div2k", image_size=8, crops=2)
    data.setup("fit")
    assert len(data.train_set) == 6
    assert not torch.equal(data.train_set[0, 0]["image"], data.train_set[1, 0]["image"])


def test_the_tiny_autoencoder_takes_the_released_weights(tmp_path: Path) -> None:
    random = TinyAutoencoder(width=8, latents=4)
    assert random.decode(random.encode(torch.zeros(1, 3, 16, 24))).shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="crop them to multiples of 8"):
        random.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(FileNotFoundError, match=r"has no taef2_encoder\.pth"):
        TinyAutoencoder(tmp_path)
    torch.save(random.encoder.state_dict(), tmp_path / "taef2_encoder.pth")
    with pytest.raises(ValueError, match="doesn't fit"):
        TinyAutoencoder(tmp_path)


def test_the_tiny_autoencoder_on_a_photograph() -> None:
    root = Path(os.environ.get("LIT_METHODS_TEST_DATA", "/nowhere"))
    if not (root / "models" / "taef2").is_dir():
        pytest.skip("LIT_METHODS_TEST_DATA has no models/taef2")
    data = RestorationDataModule(root / "kodak24", image_size=256, fit="crop")
    data.setup("test")
    image, autoencoder = data.test_set[2]["image"][None], TinyAutoencoder(root / "models" / "taef2")
    with torch.no_grad():
        gap = (autoencoder.decode(autoencoder.encode(image)) - image).square().mean() / 4
    assert -10 * float(gap.log10()) > 30


def test_degradations_of_numbers_and_files(tmp_path: Path) -> None:
    assert int((~BoxInpainting([30, 30]).mask).sum()) == 17 * 17
    assert int(ScatteredInpainting([4, 4], 6, seed=3).mask.sum()) == 6
    picture(tmp_path / "mask.png", np.array([[0, 255], [255, 255]], dtype=np.uint8))
    assert MaskFileInpainting(tmp_path / "mask.png").mask.tolist() == [[False, True], [True, True]]
    image = torch.rand(1, 1, 16, 16)
    for blur in (MotionBlur(5, seed=1), GaussianSmoothing(5, 1.0)):
        assert float((blur(image) - image).abs().max()) > 0.01
    for box in ([0, 0, 17, 2], [0, 0, 16, 16], [-1, 0, 2, 2]):
        with pytest.raises(ValueError, match="give top, left, height, width of a part"):
            BoxInpainting([16, 16], box)
    assert RandomProjection([1, 4, 4], 5)(image[..., :4, :4]).shape == (1, 5)


# ---- mistakes --------------------------------------------------------------------------------------------------------------------------


class Lopsided(nn.Module):
    """An operator whose adjoint is twice what it should be."""

    def A(self, x: Tensor, **_: Any) -> Tensor:
        return x

    def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
        return 2 * y


def test_mistakes_are_told(tmp_path: Path) -> None:
    digits, mixture = RestorationDataModule(image_size=8, eval_batch_size=4), GaussianMixtureFlow()
    with pytest.raises(ValueError, match="Lopsided fails the adjoint test"):
        tiny_trainer().test(FLAIR(mixture, Lopsided(), FAST, weighting="linear"), MixtureDataModule(num_test=4), verbose=False)
    unit = FLAIR(LatentFlow(SmallUNet(1, 8, (1,))), BoxInpainting([8, 8]), FAST, weighting="linear")
    bytes_like = [{"image": 255 * torch.rand(2, 1, 8, 8)}]
    with pytest.raises(ValueError, match=r"got images from .* to .*, expected \[-1, 1\]"):
        tiny_trainer().test(unit, torch.utils.data.DataLoader(bytes_like, batch_size=None), verbose=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs batches with image"):
        tiny_trainer().test(unit, torch.utils.data.DataLoader([torch.zeros(2, 3)], batch_size=None), verbose=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a mask of"):
        tiny_trainer().test(FLAIR(unit.prior, BoxInpainting([9, 9]), FAST, weighting="linear"), digits, verbose=False)
    with pytest.raises(TypeError, match="prior is a Linear"):
        FLAIR(nn.Linear(2, 2), BoxInpainting([8, 8]))
    with pytest.raises(TypeError, match="Linear is no linear operator"):
        FLAIR(mixture, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="without decode"):
        LatentFlow(nn.Identity(), nn.Identity())
    with pytest.warns(UserWarning, match=r"w\(t\) / t reaches 1.90.*multiply regularizer_weight by"):
        solver(weight=1.9).schedule()
    np.save(tmp_path / "curve.npy", np.array([1.0, 0.5, 0.5]))
    np.save(tmp_path / "reg_weight.npy", np.array([0.2, 0.4, 0.4]))
    given = solver(weighting="calibrated", regularizer_weight=0.5, weights=tmp_path / "curve.npy").curve_weights()
    torch.testing.assert_close(given, torch.tensor([0.3, 0.6, 0.6]).double(), rtol=1e-5, atol=0)
    given = solver(weighting="calibrated", regularizer_weight=0.5, weights=tmp_path / "reg_weight.npy").curve_weights()
    torch.testing.assert_close(given, torch.tensor([0.1, 0.2, 0.2]).double())
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    for name in ("none.npy", "square.npy"):
        with pytest.raises(ValueError, match=r"weights='.*: give"):
            solver(weights=tmp_path / name)


# ---- Stable Diffusion 3 ------------------------------------------------------------------------------------------------------------------


def test_stable_diffusion_of_random_weights_restores(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from full_recipes import sd3

    from lit_methods import SD3Flow
    from lit_methods.hub import NotThereError, weights_left_out

    torch.manual_seed(0)
    sd3(tmp_path)
    words = {"name_or_path": str(tmp_path / "sd3"), "t5": False}
    for prior in (SD3Flow(**words, prompt="a cat", precision="float32"), SD3Flow(**words, tiny_autoencoder=str(tmp_path / "taesd3"))):
        one = solver(FlairSettings(steps=2, data_steps=1), prior, BicubicDownsampling([32, 32], 4))
        found = one.restore(one.measure(torch.zeros(1, 3, 32, 32), [0], 0.01, False), [0])
        assert found.images.shape == (1, 3, 32, 32)
        assert found.images.isfinite().all()
        assert found.traces[0].mu.shape == (1, 4, 4, 4)
        assert not prior.trainable
        assert not prior.state_dict()
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7])
    guided = SD3Flow(**words, prompt="a cat", precision="float32", guidance=3.0)
    alone, other = (SD3Flow(**words, prompt=prompt, precision="float32", guidance=1.0) for prompt in ("a cat", ""))
    conditional, unconditional = alone.velocity(x, t), other.velocity(x, t)
    torch.testing.assert_close(guided.velocity(x, t), unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    (tmp_path / "prompts.json").write_text('{"one": "a cat", "two": ""}')
    each = SD3Flow(**words, prompt="a dog", prompts=tmp_path / "prompts.json", precision="float32", guidance=1.0)
    assert len(each.get_buffer("text")) == 4
    each.about(["two", "one"])
    found = each.velocity(x, t)
    torch.testing.assert_close(found, torch.stack([unconditional[0], conditional[1]]), rtol=1e-4, atol=1e-5)
    each.about(["three", "one"])
    assert (each.velocity(x, t)[0] - found[0]).abs().max() > 1e-6, "an image that isn't in the file has the common prompt"
    with pytest.raises(ValueError, match="told of 2 images and got 1"):
        each.velocity(x[:1], t[:1])
    assert each.told
    for text, says in (('["a cat"]', "isn't an object of names"), ('{"one": 3}', "isn't an object of names")):
        (tmp_path / "prompts.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            SD3Flow(**words, prompts=tmp_path / "prompts.json")
    with weights_left_out() as asked:
        SD3Flow(**words)
    assert asked
    with pytest.raises(NotThereError, match="name_or_path"):
        SD3Flow(str(tmp_path / "nothing"))
