"""The consistency term on a module that isn't ours: what it adds, what it needs, what it leaves behind."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn

from helpers import Classifier, TwoOptimisers, cloned_state, fingerprint, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods.callbacks import TwoTowerConsistency
from lit_methods.cli.main import main
from lit_methods.datamodules.loaders import make_loader
from lit_methods.prompting.coprompt.core import embedding_consistency, sentence_index


class TheirTowers(pl.LightningModule):
    """Tunes both towers on the cosines of images and classes. Samples: image, second view, label."""

    texts: Tensor
    sentences: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        with torch.random.fork_rng():
            torch.manual_seed(7)  # "pretrained": the same weights in every process
            self.pictures = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
            self.words = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 6))
        self.register_buffer("texts", torch.randn(3, 5, generator=generator))
        self.register_buffer("sentences", torch.randn(4, 3, 5, generator=generator))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image = nn.functional.normalize(self.pictures(batch["image"]), dim=1)
        text = nn.functional.normalize(self.words(self.texts), dim=1)
        return nn.functional.cross_entropy(10 * image @ text.T, batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class TheirPairs(torch.utils.data.Dataset):
    """24 pairs by (epoch, index) or index."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.image = torch.randn(24, 3, 2, 2, generator=generator)
        self.second = self.image + 0.3 * torch.randn(24, 3, 2, 2, generator=generator)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, draw: Any) -> dict[str, Any]:
        index = draw[1] if isinstance(draw, tuple) else draw
        return {"image": self.image[index], "image_second": self.second[index], "label": index % 3}


class TheirData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


def loader(batch_size: int = 4, **arguments: Any) -> Any:
    return make_loader(TheirPairs(), batch_size, shuffle=True, seed=0, drop_last=True, **arguments)


def term(**arguments: Any) -> TwoTowerConsistency:
    return TwoTowerConsistency(**({"image_tower": "pictures", "text_tower": "words", "second_text": "sentences"} | arguments))


def fit(
    callback: TwoTowerConsistency | None, data: Any = None, module: pl.LightningModule | None = None, **arguments: Any
) -> dict[str, Tensor]:
    module = module or TheirTowers()
    callbacks = [] if callback is None else [callback]
    tiny_trainer(callbacks=callbacks, **({"max_epochs": 1, "limit_train_batches": 4} | arguments)).fit(module, data or loader())
    return cloned_state(module)


def test_the_term_is_that_of_the_frozen_towers_on_second_inputs() -> None:
    logged = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            logged.append(dict(trainer.callback_metrics))

    tuned, pretrained = TheirTowers(), TheirTowers()
    callback = term(weight=2.0)
    trainer = tiny_trainer(callbacks=[callback, Watch()], max_steps=3, max_epochs=1)
    trainer.fit(tuned, loader())
    assert float(logged[-1]["coprompt/consistency_text"]) > 0
    # the first step, by hand: the student is what the teacher is
    s = sentence_index(0, 4)
    with torch.no_grad():
        expected = embedding_consistency(pretrained.words(pretrained.texts), pretrained.words(pretrained.sentences[s]))
    torch.testing.assert_close(logged[0]["coprompt/consistency_text"], expected)
    assert logged[0]["coprompt/consistency_image"] > 1e-4  # the second view differs
    torch.testing.assert_close(logged[0]["coprompt/loss"], logged[0]["coprompt/consistency_text"] + logged[0]["coprompt/consistency_image"])


def test_it_keeps_the_towers_near_where_they_were() -> None:
    start = TheirTowers()

    def moved(callback: TwoTowerConsistency | None) -> Tensor:
        module = TheirTowers()
        fit(callback, module=module, max_epochs=5, limit_train_batches=6)
        with torch.no_grad():
            return embedding_consistency(module.words(module.texts), start.words(start.texts))

    assert moved(term(second_text=None, weight=20.0)) < 0.5 * moved(None)
    assert torch.equal(moved(term(weight=0.0)), moved(None))


def test_second_inputs_default_to_the_first() -> None:
    module = TheirTowers()
    callback = term(second_image=None, second_text=None)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["coprompt/loss"]))

    tiny_trainer(callbacks=[callback, Watch()], max_steps=3, max_epochs=1).fit(module, loader())
    assert abs(seen[0]) < 1e-6
    assert seen[2] > 1e-5


def unchanged(module: pl.LightningModule, before: dict[str, Any]) -> None:
    """Lightning itself leaves attributes at the root."""
    assert {name: own for name, own in fingerprint(module).items() if name} == {name: own for name, own in before.items() if name}
    assert "training_step" not in vars(module)


def test_nothing_is_left_behind() -> None:
    module = TheirTowers()
    before = fingerprint(module)
    fit(term(), module=module)
    unchanged(module, before)

    class Failing(TheirTowers):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("on purpose")

    broken = Failing()
    before = fingerprint(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(term(), module=broken)
    unchanged(broken, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_tower": "picture"}, "image_tower: .*'picture' matches no.*pictures"),
        ({"text_tower": "words*"}, "text_tower='words\\*' matches 4 submodules"),
        ({"text_tower": "pictures"}, "both 'pictures'"),
        ({"text_tower": "joined"}, "isn't called with one tensor"),
        ({"second_image": "third"}, "another view.*second_image=None.*no 'third'"),
        ({"second_text": "phrases"}, "'phrases': name other words"),
        ({"second_text": "image"}, "row by row"),
        ({"criterion": "kl"}, "cosine, mse, l1"),
    ],
)
def test_what_is_missing_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(term(**arguments), module=Joined())


class Joined(TheirTowers):
    """Its text tower takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Bilinear(5, 5, 6)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.joined(self.texts, self.texts).mean()


def test_modules_without_towers_or_with_their_own_backward_are_refused() -> None:
    with pytest.raises(ValueError, match="image_tower"):
        fit(term(), module=Classifier())
    with pytest.raises(ValueError, match="automatic_optimization"):
        fit(term(image_tower="network.0", text_tower="network.5"), module=TwoOptimisers())


# ---- runs ------------------------------------------------------------------------------------------------------------------------------


def test_a_killed_run_ends_bit_equal(tmp_path: Path) -> None:
    whole, resumed = kill_and_resume(lambda: (TheirTowers(), loader(), [term()]), 5, 2, tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_resume_from_other_weights_is_refused() -> None:
    callback = term()
    fit(callback)
    state = callback.state_dict()
    other = TheirTowers()
    with torch.no_grad():
        other.words[0].weight.add_(0.1)
    again = term()
    again.setup(tiny_trainer(callbacks=[again]), other, "fit")
    with pytest.raises(ValueError, match="text_tower that fit starts from has other weights"):
        again.load_state_dict(state)


def in_two_processes() -> dict[str, Tensor]:
    data = loader(2, rank=torch.distributed.get_rank(), world_size=2)
    return fit(term(), data, devices=2, strategy="ddp", use_distributed_sampler=False)


def test_two_processes_end_like_one_and_like_accumulation() -> None:
    one = fit(term(), loader(4))
    accumulated = fit(term(), loader(2), accumulate_grad_batches=2, limit_train_batches=8)
    for result in (*run_two_processes(in_two_processes, timeout=300), accumulated):
        for name, value in one.items():
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_near_float32() -> None:
    exact, rough, start = fit(term()), fit(term(), precision="bf16-mixed"), cloned_state(TheirTowers())
    moved = torch.cat([(exact[name] - start[name]).flatten() for name in exact]).norm()
    apart = torch.cat([(exact[name] - rough[name]).flatten() for name in exact]).norm()
    assert 0 < apart < 0.2 * moved


def test_in_yaml(tmp_path: Path) -> None:
    own = {"image_tower": "pictures", "text_tower": "words", "second_text": "sentences", "weight": 4.0}
    config = {
        "model": {"class_path": "test_two_tower_consistency.TheirTowers"},
        "data": {"class_path": "test_two_tower_consistency.TheirData"},
        "trainer": {
            "max_steps": 2,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "callbacks+": [{"class_path": "TwoTowerConsistency", "init_args": own}],
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(file), "--run_root", str(tmp_path / "runs"), "--name", "towers"]) == 0
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    assert "coprompt/consistency_text" in metrics.read_text()
