"""TemporalVoting and DenseToSparse on modules that are not ours."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from helpers import advice_on_figures, run_two_processes
from lit_methods.callbacks import DenseToSparse, EMATeacher, TemporalVoting
from lit_methods.callbacks.lidar.temporal_voting import vote_on_batch
from lit_methods.lidar.superflow.core import temporal_vote

CLASSES, IGNORE = 3, 2


class SomeSegmentor(pl.LightningModule):
    """Somebody's own ten lines: a point-wise network and a method of their own naming."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.layer = nn.Linear(8, CLASSES)
        self.seen: list[torch.Tensor] = []

    def classify(self, cloud):
        return self.layer(self.encoder(cloud["points"], cloud["points_per_sample"]))

    def training_step(self, batch, batch_idx):
        batch = batch.get("unlabelled", batch.get("cur", batch))
        labels = batch.get("labels", torch.zeros(len(batch["points"]), dtype=torch.long))
        self.seen.append(labels)
        return nn.functional.cross_entropy(self.classify(batch), labels, ignore_index=IGNORE)

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.classify(batch))

    def predict_step(self, batch, batch_idx):
        return self.classify(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU())

    def forward(self, points, points_per_sample):
        return self.layers(points)


def cloud(sizes, seed, labels=False):
    generator = torch.Generator().manual_seed(seed)
    made = {"points": torch.randn(sum(sizes), 4, generator=generator), "points_per_sample": torch.tensor(sizes)}
    return made | ({"labels": torch.randint(CLASSES, (sum(sizes),), generator=generator)} if labels else {})


def batch_with_neighbours(seed=0, labels=True):
    motion = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    shifted = motion.clone()
    shifted[:, 0, 3] = 0.3
    before = cloud([20, 0], seed + 1) | {"to_current": shifted, "present": torch.tensor([True, False])}
    after = cloud([15, 25], seed + 2) | {"to_current": motion, "present": torch.tensor([True, True])}
    return cloud([30, 10], seed, labels) | {"neighbours": [before, after], "token": ["a", "b"]}


def trainer(*callbacks, **kwargs):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(max_steps=2, callbacks=list(callbacks), num_sanity_val_steps=0, accelerator="cpu", **options, **kwargs)


def loader(*batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def voting(**kwargs):
    return TemporalVoting(**{"predictor": "classify", "num_outputs": CLASSES, "ignore_index": IGNORE, "voxel_size": 1.0, **kwargs})


def test_vote_on_batch_equals_voting_on_each_sample_alone():
    module, batch = SomeSegmentor(), batch_with_neighbours()
    own, vote = vote_on_batch(module.classify, batch, voxel_size=1.0)
    clouds = [batch["neighbours"][0], batch, batch["neighbours"][1]]
    for sample, (start, stop) in enumerate(((0, 30), (30, 40))):
        parts = [c["points"].split(c["points_per_sample"].tolist())[sample] for c in clouds]
        frame = torch.repeat_interleave(torch.arange(3), torch.tensor([len(part) for part in parts]))
        motion = torch.stack([c.get("to_current", torch.eye(4).double().repeat(2, 1, 1))[sample] for c in clouds])
        points = torch.cat(parts)
        probs = module.classify({"points": points, "points_per_sample": torch.tensor([len(points)])}).softmax(1)
        alone = temporal_vote(points, frame, motion, probs, 1, voxel_size=1.0)
        torch.testing.assert_close(vote.probs[start:stop], alone.probs)
    torch.testing.assert_close(own, module.classify(batch).softmax(1))
    assert (vote.num_frames > 1).any()
    assert not torch.allclose(vote.probs, own)


def test_predictions_are_replaced_at_evaluation_and_the_module_is_left_as_it_was():
    torch.manual_seed(0)
    module, batch = SomeSegmentor(), batch_with_neighbours()
    run = trainer(voting())
    run.validate(module, loader(batch), verbose=False)
    refined = module.seen.pop()
    torch.testing.assert_close(refined.exp(), vote_on_batch(module.classify, batch, voxel_size=1.0)[1].probs)
    assert "classify" not in vars(module)
    logs = {name.removeprefix("voting/") for name in run.callback_metrics}
    assert {"flip_rate", "miou", "miou_own", "flip_precision", "agreement/0"} <= logs
    own = module.classify(batch).argmax(1)
    expected = (refined.argmax(1) != own).float().mean()
    torch.testing.assert_close(run.callback_metrics["voting/flip_rate"], expected)
    predicted = trainer(voting()).predict(module, loader(batch))[0]
    torch.testing.assert_close(predicted, refined)


def test_an_exception_leaves_nothing_behind():
    module = SomeSegmentor()
    broken = batch_with_neighbours()
    del broken["neighbours"]
    with pytest.raises(ValueError, match="neighbours: 1"):
        trainer(voting()).validate(module, loader(broken), verbose=False)
    assert "classify" not in vars(module)


def test_pseudo_labels_come_from_the_teacher():
    module, batch = SomeSegmentor(), batch_with_neighbours(labels=False)
    teacher = EMATeacher(decay=1.0)  # never moves: its votes are those of the weights at the start
    callback = voting(pseudo_labels=True, refine=False, confidence_threshold=0.4)
    vote = vote_on_batch(module.classify, batch, voxel_size=1.0, confidence_threshold=0.4, ignore_index=IGNORE)[1]
    trainer(callback, teacher).fit(module, loader({"unlabelled": batch}, {"unlabelled": batch}))
    assert torch.equal(module.seen[0], vote.labels)
    assert torch.equal(module.seen[1], vote.labels), "the student has moved, the teacher has not"
    assert (vote.labels == IGNORE).any(), "unsure points stay out"


def test_missing_pieces_are_named():
    with pytest.raises(TypeError, match="EMATeacher"):
        trainer(voting(pseudo_labels=True)).fit(SomeSegmentor(), loader({"unlabelled": batch_with_neighbours()}))
    with pytest.raises(TypeError, match="'point_logits'"):
        trainer(voting(predictor="point_logits")).validate(SomeSegmentor(), loader(batch_with_neighbours()), verbose=False)
    with pytest.raises(ValueError, match="voxel_size is 0"):
        voting(voxel_size=0)


@pytest.mark.parametrize("kind", ["function", "compiled", "submodule"])
def test_a_predictor_of_the_instance_votes_and_stays(kind):
    class Cloud(nn.Module):
        def forward(self, batch):
            return module.classify(batch)

    module, batch = SomeSegmentor(), batch_with_neighbours()
    _, vote = vote_on_batch(module.classify, batch, voxel_size=1.0, ignore_index=IGNORE)
    kinds = {"function": lambda: lambda cloud: module.classify(cloud), "submodule": Cloud}
    module.own = kinds[kind]() if kind in kinds else torch.compile(module.classify, backend="eager")
    module.validation_step = lambda batch, batch_idx: module.seen.append(module.own(batch))
    own = module.own
    for _ in range(2):
        trainer(voting(predictor="own")).validate(module, loader(batch), verbose=False)
        torch.testing.assert_close(module.seen[-1].exp(), vote.probs)
        assert module.own is own
    assert ("own" in vars(module)) == (kind != "submodule")


def test_pseudo_labels_of_a_predictor_of_the_instance_are_the_teachers():
    module, batch = SomeSegmentor(), batch_with_neighbours(labels=False)
    module.own = lambda cloud: module.classify(cloud)
    callback = voting(predictor="own", pseudo_labels=True, refine=False, confidence_threshold=0.4)
    vote = vote_on_batch(module.own, batch, voxel_size=1.0, confidence_threshold=0.4, ignore_index=IGNORE)[1]
    trainer(callback, EMATeacher(decay=1.0)).fit(module, loader({"unlabelled": batch}, {"unlabelled": batch}))
    assert torch.equal(module.seen[0], vote.labels)
    assert torch.equal(module.seen[1], vote.labels)


def pretraining_batch():
    generator = torch.Generator().manual_seed(5)
    superpixels = torch.randint(4, (2, 2, 6, 8), generator=generator)

    def pairs(per_sample, points):
        images = torch.stack([torch.randint(n, (2 * per_sample,), generator=generator) for n in (2, 6, 8)], dim=1)
        points = torch.randint(points, (2 * per_sample,), generator=generator)
        return {"pairing_points": points, "pairing_images": images, "pairs_per_sample": torch.tensor([per_sample] * 2)}

    return {
        "cur": cloud([30, 30], 1) | pairs(40, 30) | {"superpixels": superpixels},
        "dense": cloud([50, 50], 2) | pairs(60, 50),
        "token": ["a", "b"],
    }


def test_dense_to_sparse_joins_the_loss_of_a_foreign_module():
    batch = pretraining_batch()
    torch.manual_seed(0)
    with_term = SomeSegmentor()
    without, weightless = SomeSegmentor(), SomeSegmentor()
    for other in (without, weightless):
        other.load_state_dict(with_term.state_dict())
    run = trainer(DenseToSparse(target="encoder", num_superpixels=4))
    run.fit(with_term, loader(batch, batch))
    trainer().fit(without, loader(batch, batch))
    trainer(DenseToSparse(target="encoder", num_superpixels=4, weight=0.0)).fit(weightless, loader(batch, batch))
    assert not torch.allclose(with_term.encoder.layers[0].weight, without.encoder.layers[0].weight)
    torch.testing.assert_close(weightless.encoder.layers[0].weight, without.encoder.layers[0].weight)
    assert run.callback_metrics["dense_to_sparse/loss"] > 0
    assert "training_step" not in vars(with_term)
    assert not with_term.encoder._forward_hooks


def test_dense_to_sparse_names_what_is_missing():
    batch = pretraining_batch()
    del batch["dense"]
    with pytest.raises(ValueError, match="dense"):
        trainer(DenseToSparse(target="encoder")).fit(SomeSegmentor(), loader(batch))
    with pytest.raises(ValueError, match="more specific"):
        trainer(DenseToSparse(target="encoder*")).fit(SomeSegmentor(), loader(pretraining_batch()))


def vote_in_two_processes() -> tuple[list[str], dict[str, float]]:
    with advice_on_figures() as advice:
        run = trainer(voting(), devices=2, strategy="ddp")
        batches = [batch_with_neighbours(seed) for seed in range(4)]
        run.validate(SomeSegmentor(), loader(*batches), verbose=False)
    return advice, {name: float(value) for name, value in run.callback_metrics.items()}


def test_two_processes_log_the_figures_of_both():
    (advice, figures), other = run_two_processes(vote_in_two_processes)
    assert advice == []
    assert figures
    assert other == (advice, figures)
