"""CoPrompt as a LightningModule: what is trained, drawn, saved and logged; kills, two processes, precision, accumulation."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from helpers import cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods.callbacks import ExactResume, WeightEMA
from lit_methods.datamodules.fewshot import coloured_shapes as shapes
from lit_methods.datamodules.loaders import make_loader
from lit_methods.prompting.coprompt.core import embedding_consistency, sentence_index, sentence_table
from lit_methods.prompting.coprompt.module import CoPrompt
from lit_methods.prompting.tiny import TinyTowers

OWN = shapes.task_classes()[:6]
NAMES = [shapes.class_name(*own) for own in OWN]
SENTENCES = {shapes.class_name(*own): shapes.sentences(*own) for own in OWN}


class Pairs(torch.utils.data.Dataset):
    """Two views of 24 random images of four classes, by (epoch, index) or index."""

    def __init__(self, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(2, size, 3, shapes.SIZE, shapes.SIZE, generator=generator)

    def __len__(self) -> int:
        return self.images.shape[1]

    def __getitem__(self, draw: Any) -> dict[str, Any]:
        index = draw[1] if isinstance(draw, tuple) else draw
        return {"image": self.images[0, index], "image_second": self.images[1, index], "label": index % 4}


def small(**arguments: Any) -> CoPrompt:
    torch.manual_seed(2)
    module = CoPrompt(TinyTowers(0), **({"depth": 3, "learning_rate": 0.05, "weight_decay": 0.0, "warmup_epochs": 0} | arguments))
    module.set_classes(NAMES[:4], NAMES[4:], SENTENCES)
    return module


def loader(batch_size: int = 4, **arguments: Any) -> Any:
    return make_loader(Pairs(), batch_size, shuffle=True, seed=0, drop_last=True, **arguments)


def fit(module: pl.LightningModule, data: Any = None, **arguments: Any) -> dict[str, Tensor]:
    tiny_trainer(**({"max_epochs": 1, "limit_train_batches": 3} | arguments)).fit(module, data or loader())
    return cloned_state(module)


# ---- what is trained -------------------------------------------------------------------------------------------------------------------


def test_prompts_and_adapters_alone_are_trained_and_saved() -> None:
    module = small()
    before, towers = cloned_state(module), [p.clone() for p in module.towers.module.parameters()]
    after = fit(module)
    assert {name.partition(".")[0] for name in after} == {"prompts", "image_adapter", "text_adapter"}
    assert all(not torch.equal(before[name], value) for name, value in after.items()), "something isn't trained"
    assert all(torch.equal(a, b) for a, b in zip(towers, module.towers.module.parameters(), strict=True))


def test_the_first_prompt_starts_as_words_and_layers_start_alike() -> None:
    module = small()
    towers = module.towers.module
    assert module.prompts is not None
    words = towers.words(towers.tokenize(["a photo"]))[0, 1:3]
    assert torch.equal(module.prompts.context, words)
    with torch.no_grad():  # with these vectors alone the class prompt is the plain text
        ids = module.prompt_ids("base")
        torch.testing.assert_close(
            towers.encode_text(ids, module.prompts.context),
            towers.encode_text(towers.tokenize([f"a photo of a {name}." for name in NAMES[:4]])),
        )
    assert module.prompts.deep is not None
    assert module.prompts.deep_project is not None
    assert torch.equal(module.prompts.deep_project[0].weight, module.prompts.deep_project[1].weight)
    assert 0.01 < module.prompts.deep.std() < 0.03
    free = small(num_context=6, visual_prompts=False, depth=1)
    assert free.prefix == "X X X X X X"
    assert free.prompts is not None
    assert free.prompts.deep is None
    assert free.prompts.project is None


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ({"adapters": False, "consistency_weight": 0.0}, {"context", "deep", "project", "deep_project"}),  # MaPLe
        ({"num_context": 8, "depth": 1, "visual_prompts": False, "adapters": False, "consistency_weight": 0.0}, {"context"}),  # CoOp
        ({"num_context": 0, "consistency_weight": 0.0}, set()),  # adapters alone
    ],
)
def test_baselines_are_the_same_class(arguments: dict[str, Any], trained: set[str]) -> None:
    module = small(**arguments)
    before = cloned_state(module)
    after = fit(module)
    assert {name.split(".")[1] for name in after if name.startswith("prompts.")} == trained
    assert all(not torch.equal(before[name], value) for name, value in after.items())


def test_without_prompts_and_adapters_it_is_zero_shot_and_refuses_to_train() -> None:
    module = small(num_context=0, adapters=False, consistency_weight=0.0)
    images, towers = Pairs().images[0, :5], module.towers.module
    with torch.no_grad():
        texts = towers.tokenize([f"a photo of a {name}." for name in NAMES[:4]])
        torch.testing.assert_close(module(images), towers(images, texts))
    with pytest.raises(ValueError, match="lit validate"):
        fit(module)


# ---- the consistency term --------------------------------------------------------------------------------------------------------------


def test_the_teacher_sees_the_second_view_and_the_sentence_of_the_step() -> None:
    module, seen = small(num_context=0, adapters=False), {}
    module.log = lambda name, value, **_: seen.update({name: value})  # type: ignore[method-assign, assignment]
    module.log_dict = lambda values, **_: seen.update(values)  # type: ignore[method-assign, assignment]
    module.trainer = tiny_trainer()
    data = Pairs()
    batch = {"image": data.images[0, :4], "image_second": data.images[1, :4], "label": torch.arange(4)}
    loss = module.training_step(batch, 0)
    towers, s = module.towers.module, sentence_index(0, 10)
    with torch.no_grad():
        own = towers.encode_text(towers.tokenize([f"a photo of a {name}." for name in NAMES[:4]]))
        text = embedding_consistency(own, towers.encode_text(towers.tokenize([SENTENCES[name][s] for name in NAMES[:4]])))
        image = embedding_consistency(towers.encode_image(batch["image"]), towers.encode_image(batch["image_second"]))
    torch.testing.assert_close(seen["prompting/consistency_text"], text)
    torch.testing.assert_close(seen["prompting/consistency_image"], image)
    torch.testing.assert_close(loss, seen["prompting/cross_entropy"] + 8 * (text + image))
    assert image > 0.001


def test_sentences_vary_from_step_to_step_and_are_repeatable() -> None:
    draws = [sentence_index(step, 10) for step in range(200)]
    assert set(draws) == set(range(10))
    assert draws == [sentence_index(step, 10) for step in range(200)]
    assert draws != [sentence_index(step, 10, seed=1) for step in range(200)]


def test_sentences_are_found_by_plain_names_and_missing_ones_named() -> None:
    known = {"Annual Crop Land": ["one", "two"], "Forest": ["three", "four"]}
    assert sentence_table(["annual_crop_land", "forest"], known) == [["one", "three"], ["two", "four"]]
    with pytest.raises(ValueError, match=r"'River' has no description.*consistency_weight to 0"):
        sentence_table(["Forest", "River"], known)
    with pytest.raises(ValueError, match="'b' has 2 descriptions, 'a' has 1"):
        sentence_table(["a", "b"], {"a": ["x"], "b": ["y", "z"]})


def test_more_consistency_keeps_the_embeddings_nearer() -> None:
    def drift(weight: float) -> Tensor:
        module = small(consistency_weight=weight, learning_rate=0.3)
        fit(module, max_epochs=4, limit_train_batches=6)
        images, towers = Pairs().images[0], module.towers.module
        with torch.no_grad():
            return embedding_consistency(module.embed_images(images), towers.encode_image(images))

    assert drift(8.0) < drift(0.0)


# ---- errors ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 4}, "depth=4.*3 blocks"),
        ({"criterion": "kl"}, "cosine, mse, l1"),
        ({"consistency_weight": -1.0}, r"consistency_weight is -1.0: give a number in \[0, inf\)"),
        ({"image_mix": 1.5}, r"image_mix is 1.5: give a share in \[0, 1\]"),
        ({"learning_rate": 0.0}, r"learning_rate is 0.0: give a number in \(0, inf\)"),
    ],
)
def test_arguments_outside_their_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_missing_classes_views_and_sentences_are_named() -> None:
    with pytest.raises(RuntimeError, match="FewShotDataModule, or call set_classes"):
        fit(CoPrompt(TinyTowers(0), depth=3))
    module = small()
    module.set_classes(NAMES[:4])
    with pytest.raises(ValueError, match="has no description"):
        fit(module)
    with pytest.raises(ValueError, match=r"no 'image_second'.*consistency_weight to 0"):
        fit(small(), torch.utils.data.DataLoader([{"image": torch.zeros(3, 24, 24), "label": 0}]))
    module.set_classes(NAMES[:4])
    with pytest.raises(ValueError, match="loader 1 has no classes"):
        tiny_trainer().validate(module, [loader(), loader()], verbose=False)
    with pytest.raises(ValueError, match="needs an end, and this training has none: set max_steps or max_epochs"):
        fit(small(), max_epochs=-1)


# ---- evaluation ------------------------------------------------------------------------------------------------------------------------


def test_evaluation_counts_both_parts_and_compares_with_zero_shot() -> None:
    module = small()
    trainer = tiny_trainer()
    data = Pairs(), torch.utils.data.Subset(Pairs(), [0, 1, 4, 5])  # labels 0 and 1
    loaders = [torch.utils.data.DataLoader(part, batch_size=10) for part in data]
    trainer.validate(module, loaders, verbose=False)
    logged = trainer.callback_metrics
    with torch.no_grad():
        images, towers = Pairs().images[0], module.towers.module
        base = (module(images).argmax(1) == torch.arange(24) % 4).float().mean()
        texts = towers.tokenize([f"a photo of a {name}." for name in NAMES[4:]])
        zero_new = (towers(images[[0, 1, 4, 5]], texts).argmax(1) == torch.tensor([0, 1, 0, 1])).float().mean()
    torch.testing.assert_close(logged["prompting/val_base_accuracy"], base)
    torch.testing.assert_close(logged["prompting/val_zero_shot_new_accuracy"], zero_new)
    new = logged["prompting/val_new_accuracy"]
    torch.testing.assert_close(logged["prompting/val_harmonic_mean"], 2 * base * new / (base + new).clamp(min=1e-9))
    assert logged["prompting/val_drift_base"] > 0
    table = module.dashboard_media()["prompting/classes"]
    assert [row[0] for row in table.rows] == NAMES  # type: ignore[union-attr]
    predicted = trainer.predict(module, loaders)
    assert predicted is not None
    assert [tuple(part[0]["logits"].shape) for part in predicted] == [(10, 4), (4, 2)]  # type: ignore[index]


# ---- runs ------------------------------------------------------------------------------------------------------------------------------


def build() -> tuple[pl.LightningModule, Any, list[pl.Callback]]:
    return small(), loader(), [ExactResume(), WeightEMA(decay=0.5)]


def test_a_killed_run_ends_bit_equal(tmp_path: Path) -> None:
    whole, resumed = kill_and_resume(build, 5, 2, tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def in_two_processes() -> dict[str, Tensor]:
    return fit(
        small(), loader(2, rank=torch.distributed.get_rank(), world_size=2), devices=2, strategy="ddp", use_distributed_sampler=False
    )


def test_two_processes_end_like_one_and_like_accumulation() -> None:
    one = fit(small(), loader(4))
    accumulated = fit(small(), loader(2), accumulate_grad_batches=2, limit_train_batches=6)
    for result in (*run_two_processes(in_two_processes, timeout=300), accumulated):
        for name, value in one.items():
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-6)


def test_training_goes_on_after_an_evaluation() -> None:
    plain, module = fit(small()), small()
    tiny_trainer(num_sanity_val_steps=1, max_epochs=1, limit_train_batches=3).fit(module, loader(), torch.utils.data.DataLoader(Pairs(), 4))
    assert all(torch.equal(value, plain[name]) for name, value in cloned_state(module).items())


def test_bfloat16_stays_near_float32() -> None:
    exact, rough = fit(small()), fit(small(), precision="bf16-mixed")
    start = cloned_state(small())
    moved = torch.cat([(exact[name] - start[name]).flatten() for name in exact])
    apart = torch.cat([(exact[name] - rough[name]).flatten() for name in exact])
    assert all(value.dtype == torch.float32 for value in rough.values())
    assert 0 < apart.norm() < 0.2 * moved.norm()


def test_the_rate_follows_the_epochs() -> None:
    module = small(warmup_epochs=1, learning_rate=0.05)
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(module, max_epochs=3, limit_train_batches=1, callbacks=[Watch()])
    assert seen == pytest.approx([1e-5, 0.05, 0.0375])
