"""A term joins the loss of modules that know nothing of it, counts exactly once, and leaves no trace."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    compiled_classifier,
    fingerprint,
    kill_and_resume,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.run.exact_resume import ExactResume
from lit_methods.datamodules.loaders import make_loader


class MeanSquare(LossTerm):
    """Mean square of the features: easy to compute by hand."""

    def term(self, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        return sum(f.float().square().mean() for f in inputs["features"].values())


def plain_network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4))


def images(batch_size: int = 8, **kwargs: Any) -> DataLoader:
    return make_loader(Images(), batch_size, shuffle=True, seed=3, drop_last=True, **kwargs)


def boring_data() -> DataLoader:
    return DataLoader(torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), batch_size=4)


def words() -> DataLoader:
    tokens = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), batch_size=2)


class ReturnsTensor(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, batch_idx)["loss"]


class OfflineTransformer(LightningTransformer):
    def prepare_data(self) -> None:
        """The demo would download its text here."""


STRANGERS = {
    "boring": (BoringModel, boring_data, "layer"),
    "transformer": (lambda: OfflineTransformer(vocab_size=20), words, "model.decoder"),
    "resnet18": (resnet_classifier, images, "network.layer[34]"),
    "dict": (Classifier, images, "network.5"),
    "tensor": (ReturnsTensor, images, "network.5"),
    "compiled": (compiled_classifier, images, "network"),
    "part of compiled": (compiled_classifier, images, "network.5"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_module_learns_from_the_term_and_is_left_as_it_was(name: str) -> None:
    build, data, target = STRANGERS[name]

    def train(weight: float | None) -> tuple[pl.LightningModule, dict[str, Any], dict[str, Any], dict[str, Tensor]]:
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        module = build()
        before = fingerprint(module)
        callbacks = [] if weight is None else [MeanSquare([target], weight=weight)]
        trainer = tiny_trainer(max_steps=2, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(module, data())
        return module, before, fingerprint(module), {k: v for k, v in trainer.logged_metrics.items() if "mean_square" in k}

    without, _, after_plain, _ = train(None)
    zero, before, after, _ = train(0.0)
    assert_state_dicts_equal(zero.state_dict(), without.state_dict())  # watching alone changes nothing
    assert after == after_plain
    module, _, after, logged = train(3.0)
    assert after == after_plain
    assert "training_step" not in vars(module)
    assert {key: value for key, value in before.items() if key} == {key: value for key, value in after.items() if key}
    assert any(not torch.equal(a, b) for a, b in zip(module.state_dict().values(), without.state_dict().values(), strict=True))
    assert list(logged) == ["mean_square/loss"]
    assert logged["mean_square/loss"] > 0


def by_hand(weight: float, accumulate: int, steps: int, batch_size: int) -> dict[str, Tensor]:
    """The same training without Lightning and without the callback."""
    network = plain_network()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    loader, step, epoch = images(batch_size), 0, 0
    while step < steps:
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for count, (image, label) in enumerate(loader, start=1):
            features = network[:2](image)
            loss = nn.functional.cross_entropy(network[2:](features), label) + weight * features.square().mean()
            (loss / accumulate).backward()
            if count % accumulate == 0:
                optimiser.step()
                optimiser.zero_grad()
                step += 1
                if step == steps:
                    break
        epoch += 1
    return {f"network.{name}": value for name, value in cloned_state(network).items()}


@pytest.mark.parametrize(("accumulate", "batch_size"), [(1, 8), (3, 4)])
def test_equals_the_sum_written_by_hand(accumulate: int, batch_size: int) -> None:
    module = Classifier(plain_network())
    trainer = tiny_trainer(max_steps=4, accumulate_grad_batches=accumulate, callbacks=[MeanSquare(["network.1"], weight=0.7)])
    trainer.fit(module, images(batch_size))
    assert_state_dicts_equal(module.state_dict(), by_hand(0.7, accumulate, 4, batch_size), atol=1e-6)
    other = by_hand(0.0, accumulate, 4, batch_size)
    assert (module.state_dict()["network.1.weight"] - other["network.1.weight"]).abs().max() > 1e-3


def test_bf16_mixed() -> None:
    class Dtypes(MeanSquare):
        seen: set[torch.dtype] = set()  # noqa: RUF012

        def term(self, inputs: dict[str, Any]) -> Any:
            self.seen |= {f.dtype for f in inputs["features"].values()}
            return super().term(inputs)

    module = Classifier(plain_network())
    tiny_trainer(max_steps=4, precision="bf16-mixed", callbacks=[Dtypes(["network.1"], weight=0.7)]).fit(module, images())
    assert Dtypes.seen == {torch.bfloat16}
    assert_state_dicts_equal(module.state_dict(), by_hand(0.7, 1, 4, 8), atol=2e-2)


def train_on_two_ranks() -> dict[str, Tensor]:
    module = Classifier(plain_network())
    trainer = tiny_trainer(max_steps=4, devices=2, strategy="ddp", callbacks=[MeanSquare(["network.1"], weight=0.7)])
    trainer.fit(module, images(4))
    return cloned_state(module)


def test_two_ranks_equal_one_process() -> None:
    first, second = run_two_processes(train_on_two_ranks)
    assert_state_dicts_equal(first, second)
    assert_state_dicts_equal(first, by_hand(0.7, 1, 4, 8), atol=1e-6)


def test_several_terms_with_logs_see_everything_the_step_knows() -> None:
    seen: list[dict[str, Any]] = []

    class Spy(LossTerm):
        name = "spy"

        def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append({**inputs, "loss": float(inputs["output"]["loss"].detach())})
            return torch.ones(()), {"extra": torch.full((), 5.0)}

        def factor(self, step: int) -> float:
            return 10.0 * step

    module = Classifier()
    trainer = tiny_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[Spy(), Spy(["network.7"])])
    trainer.fit(module, images(4))
    assert [s["step"] for s in seen] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]  # optimiser steps, two micro-batches each, two terms
    first, second = seen[-2:]
    assert first["features"] == {}
    assert second["features"]["network.7"].shape == (4, 4)
    assert [len(calls) for calls in second["feature_calls"].values()] == [1]
    assert second["loss"] == pytest.approx(first["loss"] + 20.0)  # the second sees the sum with the first
    assert set(second["output"]) == {"loss", "seen"}
    assert first["module"] is module
    assert first["epoch"] == 0
    assert first["batch"][0].shape == (4, 3, 8, 8)
    assert {k for k in trainer.logged_metrics if "spy" in k} == {"spy/loss", "spy/extra", "spy_2/loss", "spy_2/extra"}
    assert trainer.logged_metrics["spy/extra"] == 5


class Measures(Classifier):
    """Logs, counts and draws in its step: what a second pass must not do twice."""

    def __init__(self) -> None:
        super().__init__()
        self.hits, self.losses = MulticlassAccuracy(4), MeanMetric()
        self.batches: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches.append(batch_idx)
        output = super().training_step(batch, batch_idx)
        self.hits.update(self.network(batch[0]), batch[1])
        self.losses(output["loss"])
        self.log("own/loss", output["loss"].detach(), on_epoch=True)
        self.log_dict({"own/hits": self.hits}, on_step=True)
        return output


class Twice(LossTerm):
    """Distance of the features of two passes, which dropout makes."""

    again = True
    seen: list[Any]

    def term(self, inputs: dict[str, Any]) -> Tensor:
        first = inputs["features"]["network.5"]
        second = self.run_again() if self.again else None
        hits = inputs["module"].hits
        counted = {"updates": hits.update_count, "samples": int(hits.tp.sum() + hits.fn.sum())}
        self.seen.append((inputs, second, counted | {name: len(calls) for name, calls in self._capture.calls.items()}))
        return first.square().mean() if second is None else (first - second.features["network.5"]).square().mean()


def test_a_second_pass_is_seen_by_nobody_else() -> None:
    def fit(again: bool) -> tuple[Measures, list[Any], dict[str, Tensor], list[int]]:
        term, counts = Twice(["network.5"], weight=0.0), []
        term.again, term.seen = again, []

        class Later(MeanSquare):
            def term(self, inputs: dict[str, Any]) -> Any:
                counts.append(len(inputs["feature_calls"]["network.5"]))
                return super().term(inputs)

        pl.seed_everything(0, verbose=False)
        module = Measures()
        trainer = tiny_trainer(max_steps=2, callbacks=[term, Later(["network.5"])])
        trainer.fit(module, images())
        return module, term.seen, dict(trainer.logged_metrics), counts

    once, _, logged_once, _ = fit(again=False)
    twice, seen, logged, counts = fit(again=True)
    assert twice.batches == [0, 0, 1, 1]
    assert once.batches == [0, 1]
    assert [inputs["batch_idx"] for inputs, *_ in seen] == [0, 1]
    assert set(logged) == set(logged_once)
    assert twice.losses.update_count == once.losses.update_count == 2
    assert [counted for *_, counted in seen] == [{"updates": n, "samples": 8 * n, "network.5": 2} for n in (1, 2)]
    inputs, second, _ = seen[0]
    assert len(second.feature_calls["network.5"]) == 2  # the module calls it twice
    assert counts == [2, 2]  # the other term sees the step's own features
    assert set(second.output) == {"loss", "seen"}
    assert float(second.output["loss"].detach()) != float(inputs["output"]["loss"].detach())  # other dropout, without any term
    assert "log" not in vars(twice)
    assert second.output["loss"].requires_grad


def test_a_second_pass_of_another_batch_or_part() -> None:
    class Other(LossTerm):
        def term(self, inputs: dict[str, Any]) -> Tensor:
            image, label = inputs["batch"]
            (arguments, keywords), *_ = inputs["feature_arguments"]["network.7"]
            assert arguments[0].shape == (8, 8)
            assert keywords == {}
            module = inputs["module"].eval()
            flipped = self.run_again([image.flip(0), label.flip(0)])
            part = self.run_again(image.flip(0), module.network)
            module.train()
            torch.testing.assert_close(part.features["network.7"], flipped.features["network.7"])
            assert part.output is part.features["network.7"]
            assert self._capture.last["network.7"] is inputs["features"]["network.7"]
            return flipped.output["loss"]

    trainer = tiny_trainer(max_steps=1, callbacks=[Other(["network.7"], weight=0.5)])
    trainer.fit(Classifier(), images())
    assert trainer.logged_metrics["other/loss"] > 0


def test_an_iterator_can_not_be_read_twice() -> None:
    class Iterates(BoringModel):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    class Again(LossTerm):
        def term(self, inputs: dict[str, Any]) -> Tensor:
            return self.run_again().output["loss"]

    with pytest.raises(ValueError, match="dataloader_iter, which can't be read twice"):
        tiny_trainer(max_steps=1, callbacks=[Again()]).fit(Iterates(), boring_data())


def test_a_skipped_step_stays_skipped() -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else output

    module = Skips(plain_network())
    before = cloned_state(module)
    tiny_trainer(max_epochs=1, limit_train_batches=2, callbacks=[MeanSquare(["network.1"])]).fit(module, images())
    after_two = cloned_state(module)
    module = Classifier(plain_network())
    tiny_trainer(max_epochs=1, limit_train_batches=1, callbacks=[MeanSquare(["network.1"])]).fit(module, images())
    assert_state_dicts_equal(after_two, module.state_dict())
    assert not torch.equal(before["network.1.weight"], after_two["network.1.weight"])


def test_an_optimiser_that_repeats_the_step() -> None:
    class Lbfgs(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    calls = []

    class Counts(MeanSquare):
        def term(self, inputs: dict[str, Any]) -> Any:
            calls.append([len(c) for c in inputs["feature_calls"].values()])
            return super().term(inputs)

    tiny_trainer(max_steps=1, callbacks=[Counts(["network.1"])]).fit(Lbfgs(plain_network()), images())
    assert len(calls) > 1
    assert all(count == [1] for count in calls)


def test_validation_is_not_captured() -> None:
    term = MeanSquare(["network.1"])
    kept: list[dict[str, Any]] = []

    class Looks(pl.Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            assert term._features is not None
            kept.append(term._features.last)

    tiny_trainer(max_epochs=1, callbacks=[term, Looks()]).fit(Classifier(plain_network()), images(), images())
    assert len(kept) == 3
    assert not any(kept)


class Fails(Exception):
    pass


@pytest.mark.parametrize("where", ["training_step", "setup of a later callback"])
def test_nothing_is_left_after_an_exception(where: str) -> None:
    class FailsInStep(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise Fails
            return super().training_step(batch, batch_idx)

    class FailsInSetup(pl.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            raise Fails

    module = FailsInStep() if where == "training_step" else Classifier()
    before = fingerprint(module)
    callbacks: list[pl.Callback] = [MeanSquare(["network.5"]), MeanSquare(["network.7"])]
    if where != "training_step":
        callbacks.append(FailsInSetup())
    with pytest.raises(Fails):
        tiny_trainer(max_steps=3, callbacks=callbacks).fit(module, images())
    after = fingerprint(module)
    assert {key: value for key, value in after.items() if key} == {key: value for key, value in before.items() if key}
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("module", [ManualOptimBoringModel, TwoOptimisers])
def test_manual_optimisation_is_refused(module: type[pl.LightningModule]) -> None:
    stranger = module()
    before = fingerprint(stranger)
    with pytest.raises(
        ValueError, match=rf"MeanSquare adds to the loss .* {module.__name__} calls backward itself.*add the term's function"
    ):
        tiny_trainer(max_steps=1, callbacks=[MeanSquare()]).fit(stranger, images())
    assert {k: v for k, v in fingerprint(stranger).items() if k} == {k: v for k, v in before.items() if k}


def test_errors_say_what_is_wrong() -> None:
    class ReturnsNothingUseful(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"logits": self.network(batch[0])}

    class Partial(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(1, 1)

    def fit(module: pl.LightningModule, term: LossTerm) -> None:
        tiny_trainer(max_steps=1, callbacks=[term]).fit(module, images())

    with pytest.raises(TypeError, match="returned dict without a loss"):
        fit(ReturnsNothingUseful(), MeanSquare())
    with pytest.raises(ValueError, match="training_step didn't call unused"):
        fit(Partial(), MeanSquare(["unused", "network.5"]))
    with pytest.raises(ValueError, match="matches no submodule of Classifier; nearest"):
        fit(Classifier(), MeanSquare(["netwrk.5"]))
    with pytest.raises(NotImplementedError, match="LossTerm must define term"):
        fit(Classifier(), LossTerm())
    with pytest.raises(ValueError, match=r"give a list of patterns, \['network'\]"):
        MeanSquare("network")


def test_only_fit_is_touched() -> None:
    module = Classifier()
    before = fingerprint(module)
    trainer = tiny_trainer(callbacks=[MeanSquare(["nowhere at all"])])
    trainer.validate(module, images(), verbose=False)
    assert {k: v for k, v in fingerprint(module).items() if k} == {k: v for k, v in before.items() if k}


@pytest.mark.parametrize("kill_at", [2, 4])
def test_killed_and_resumed(tmp_path: Path, kill_at: int) -> None:
    """With dropout, batch norm and a term; 24 samples are 3 batches of 8 an epoch."""

    class Warming(MeanSquare):
        def factor(self, step: int) -> float:
            return 0.3 * step

    whole, resumed = kill_and_resume(lambda: (Classifier(), images(), [ExactResume(), Warming(["network.5"])]), 6, kill_at, tmp_path)
    assert_state_dicts_equal(resumed, whole)


# ---- targets without a graph, logs, trial steps ----------------------------------------------------------------------------------------


class Parts(BoringModel):
    """Calls its layers in ways that leave a graph, or none."""

    def __init__(self, how: str = "") -> None:
        torch.manual_seed(0)
        super().__init__()
        self.how, self.body, self.other = how, nn.Linear(32, 32), nn.Linear(32, 32)
        if how == "frozen":
            self.body.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        with torch.set_grad_enabled(self.how != "no_grad"):
            if "reentrant" in self.how:
                batch.requires_grad_()
                body = checkpoint(lambda x: self.body(x).tanh(), batch, use_reentrant=self.how == "reentrant")
            else:
                body = self.body(batch)
        return self.loss(self.layer(body + self.other(batch)))


@pytest.mark.parametrize("how", ["frozen", "no_grad", "reentrant"])
def test_targets_without_a_graph_are_refused_by_name(how: str) -> None:
    with pytest.raises(ValueError, match="MeanSquare: the output of body has no graph, so the term would be logged and train nothing"):
        tiny_trainer(max_steps=1, callbacks=[MeanSquare(["body"])]).fit(Parts(how), boring_data())


class Apart(LossTerm):
    """The distance of two targets."""

    def term(self, inputs: dict[str, Any]) -> Tensor:
        body, other = inputs["features"].values()
        return (body - other).square().mean()


@pytest.mark.parametrize(
    ("how", "term"),
    [
        ("", MeanSquare(["body"])),
        ("not reentrant", MeanSquare(["body"])),
        ("frozen", Apart(["body", "other"])),  # a teacher
        ("frozen", type("Nothing", (LossTerm,), {"term": lambda self, inputs: torch.zeros(())})(["body"])),  # nothing to do in this batch
    ],
    ids=["plain", "not reentrant", "teacher", "nothing"],
)
def test_terms_that_learn_or_have_nothing_to_do_are_left_alone(how: str, term: LossTerm) -> None:
    trainer = tiny_trainer(max_steps=2, callbacks=[term])
    trainer.fit(Parts(how), boring_data())
    assert trainer.global_step == 2


class Written(pl.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((step, {name: value for name, value in metrics.items() if name != "epoch"}))


class Many(LossTerm):
    def term(self, inputs: dict[str, Any]) -> Any:
        square = inputs["features"]["body"].square().mean()
        return square, {"step": torch.tensor(float(inputs["step"])), "half": square.half(), "count": (square > 0).sum()}


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (3, 1), (2, 2), (50, 1), (0, 1)])
def test_logged_steps_and_what_callbacks_see_are_those_of_logging_at_every_step(
    every: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class See(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

        on_train_epoch_end = on_train_batch_end  # type: ignore[assignment]

    calls = 0

    def run(always: bool) -> tuple[Any, Any]:
        nonlocal calls
        module, see, written = Parts(), See(), Written()
        log_dict, calls = module.log_dict, 0

        def counted(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            log_dict(*args, **kwargs)

        module.log_dict = counted  # type: ignore[method-assign]
        with monkeypatch.context() as patched:
            if always:
                patched.setattr(LossTerm, "_log", staticmethod(lambda module, values: module.log_dict(values)))
            data = DataLoader(torch.randn(44, 32, generator=torch.Generator().manual_seed(0)), batch_size=4)
            options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": every, "logger": written}
            tiny_trainer(max_epochs=2, callbacks=[Many(["body"]), see], **options).fit(module, data)
        return see.seen, written.rows

    expected, ours = run(True), run(False)
    assert ours == expected
    assert len(ours[0]) == 24
    assert calls == {1: 22, 3: 2 + 6, 2: 12, 50: 2, 0: 2}[every], "logged steps, and the first of an epoch"


def test_trial_steps_of_lightnings_tuner_are_without_the_term_in_words() -> None:
    module, term = Parts(), MeanSquare(["body"])
    module.lr = 0.1  # type: ignore[assignment]
    trainer = tiny_trainer(max_steps=3, callbacks=[term])
    with pytest.warns(UserWarning, match="MeanSquare adds nothing to their loss") as told:
        pl.tuner.Tuner(trainer).lr_find(module, boring_data(), num_training=4, update_attr=False)
    assert len([one for one in told if "adds nothing" in str(one.message)]) == 1
    trainer.fit(module, boring_data())
    assert trainer.callback_metrics["mean_square/loss"] > 0
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("hook", ["configure_model", "setup"])
def test_layers_that_the_module_makes_late(hook: str) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.network = self.network, None  # type: ignore[assignment]

        def make(self, stage: str = "fit") -> None:
            self.network, self.made = self.made or self.network, None  # type: ignore[assignment]

    module = type("Late", (Late,), {hook: Late.make})()
    trainer = tiny_trainer(max_steps=2, callbacks=[MeanSquare(["network.5"])])
    trainer.fit(module, images())
    assert "mean_square/loss" in trainer.callback_metrics
    assert not {hook, "training_step"} & set(vars(module))
    with pytest.raises(ValueError, match=r"^MeanSquare: targets.*'nothing' matches no submodule"):
        tiny_trainer(max_steps=2, callbacks=[MeanSquare(["nothing"])]).fit(module, images())
    assert not {hook, "training_step"} & set(vars(module))
