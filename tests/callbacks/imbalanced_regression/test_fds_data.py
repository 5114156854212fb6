"""FDS and the data: it reads what the training loader draws, label by label, and refuses at the start what it can't read."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from helpers import tiny_trainer
from lit_methods.callbacks import FDS
from lit_methods.callbacks.imbalanced_regression.fds.core import MomentSums, moments

TRAINING, ALL = 12, 20  # the samples behind the first twelve are for validation
X = torch.randn(ALL, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, torch.arange(float(ALL)))


class Body(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 1)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Endless(Sampler):
    """Draws from the training samples for ever."""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(TRAINING))


def collected(loader: Any, **kwargs: Any) -> tuple[list[list[int]], FDS]:
    """Labels of each batch of the pass."""
    fds = FDS("body", last_bucket=ALL, **{name: kwargs.pop(name) for name in ("collect_every",) if name in kwargs})
    batches: list[list[int]] = []
    rows, module = fds._rows, Body()

    def spy(output: Any, batch: Any) -> Any:
        if not module.training:
            batches.append([int(label) for label in batch[1]])
        return rows(output, batch)

    fds._rows = spy  # type: ignore[method-assign]
    tiny_trainer(max_epochs=1, callbacks=[fds], **kwargs).fit(module, loader)
    return batches, fds


def weights() -> list[float]:
    return [1.0] * TRAINING + [0.0] * (ALL - TRAINING)


LOADERS: dict[str, tuple[Any, dict[str, Any], bool]] = {  # loader, trainer's arguments, whether each training sample is drawn once
    "subset": (lambda: DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(TRAINING))), {}, True),
    "sequence": (lambda: DataLoader(DATA, 4, sampler=SequentialSampler(range(TRAINING))), {}, True),
    "list": (lambda: DataLoader(DATA, 4, sampler=list(range(TRAINING))), {}, True),  # type: ignore[arg-type]
    "batches": (lambda: DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(TRAINING)), 4, True)), {}, True),
    "lists of batches": (lambda: DataLoader(DATA, batch_sampler=[list(range(k, k + 4)) for k in (0, 4, 8)]), {}, True),  # type: ignore[arg-type]
    "weighted": (lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler(weights(), TRAINING)), {}, False),
    "replacement": (lambda: DataLoader(DATA, 4, sampler=RandomSampler(range(TRAINING), replacement=True)), {}, False),  # type: ignore[arg-type]
    "endless": (lambda: DataLoader(DATA, 4, sampler=Endless()), {"limit_train_batches": 3}, True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_statistics_come_from_what_the_loader_draws(name: str) -> None:
    make, options, whole = LOADERS[name]
    batches, fds = collected(make(), **options)
    labels = sorted(label for batch in batches for label in batch)
    assert {len(batch) for batch in batches} == {4}
    assert max(labels) < TRAINING
    assert len(labels) == TRAINING
    assert not whole or labels == list(range(TRAINING))
    seen = torch.zeros(ALL + 1, dtype=torch.bool)
    seen[sorted(set(labels))] = True
    assert torch.equal(fds.statistics.mean.abs().sum(1) > 0, seen)  # type: ignore[union-attr]


def test_a_plain_loader_is_read_whole_and_every_second_sample_of_batches_can_be_taken() -> None:
    batches, _ = collected(DataLoader(DATA, 4, shuffle=True))
    assert batches == [list(range(k, k + 4)) for k in range(0, ALL, 4)]
    batches, _ = collected(DataLoader(DATA, batch_sampler=BatchSampler(range(TRAINING), 4, False)), collect_every=2)
    assert batches == [[0, 2], [4, 6], [8, 10]]


def test_a_loader_of_whole_batches() -> None:
    whole = [(X[k : k + 5], torch.arange(k, k + 5.0)) for k in range(0, ALL, 5)]
    batches, _ = collected(DataLoader(whole, batch_size=None))  # type: ignore[arg-type]
    assert batches == [list(range(k, k + 5)) for k in range(0, ALL, 5)]


def test_labels_of_feature_maps() -> None:
    fds = FDS(last_bucket=50)
    maps = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 5)  # image k holds k everywhere
    for labels, views in ((torch.arange(4.0), 1), (torch.arange(4.0)[:, None], 1), (torch.arange(2.0), 2)):
        rows, used = fds._rows(maps % 2 if views == 2 else maps, (None, labels))
        assert torch.equal(rows[:, 0], used.floor())
        assert len(rows) == 40
    places = torch.arange(40.0).view(4, 2, 5)
    rows, used = fds._rows(places[:, None], {"target": places})
    assert torch.equal(rows[:, 0], used.floor())
    for output, labels in (
        (maps, torch.zeros(4, 2)),  # a label for each row of the image
        (torch.zeros(4, 3, 4, 4), torch.zeros(4, 2, 2)),  # a coarser grid, whose labels would be dealt out in turns
        (maps, torch.zeros(3)),
        (torch.zeros(4, 7, 3), torch.zeros(4)),  # which axis holds the features isn't known
        (torch.zeros(4, 3), torch.zeros(())),
    ):
        with pytest.raises(ValueError, match="features='backbone' puts out"):
            fds._rows(output, (None, labels))


class Numbers(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, torch.arange(float(ALL)), strict=True))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Numbers(), 4), "data set of known length"),
        ([DataLoader(DATA, 4), DataLoader(DATA, 4)], "one training loader"),
        (DataLoader(DATA, 4, sampler=Endless()), "Endless draws in an epoch, and it has no end"),
    ],
    ids=["iterable", "two loaders", "endless"],
)
def test_data_that_cannot_be_read_again_are_refused_before_the_first_step(loader: Any, message: str) -> None:
    module = Body()
    with pytest.raises(ValueError, match=message):
        tiny_trainer(max_steps=4, callbacks=[FDS("body")]).fit(module, loader)
    assert module.steps == 0


def test_labels_outside_the_buckets_are_told_once_with_their_share() -> None:
    def told(last_bucket: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny_trainer(max_epochs=3, callbacks=[FDS("body", last_bucket=last_bucket, kernel_size=1)]).fit(Body(), DataLoader(DATA, 4))
        return [str(one.message) for one in caught if "outside the buckets" in str(one.message)]

    (message,) = told(1)
    assert "90% of the labels" in message
    assert "from 0 to 2" in message
    assert told(ALL) == []


def test_a_second_fit_has_statistics_of_its_own() -> None:
    fds, module = FDS("body", last_bucket=ALL), Body()
    tiny_trainer(max_epochs=3, callbacks=[fds]).fit(module, DataLoader(DATA, 4))
    tiny_trainer(max_epochs=2, callbacks=[fds]).fit(module, DataLoader(DATA, 4))
    twin, fresh = Body(), FDS("body", last_bucket=ALL)
    tiny_trainer(max_epochs=3, callbacks=[FDS("body", last_bucket=ALL)]).fit(twin, DataLoader(DATA, 4))
    tiny_trainer(max_epochs=2, callbacks=[fresh]).fit(twin, DataLoader(DATA, 4))
    assert torch.equal(fds.statistics.mean, fresh.statistics.mean)  # type: ignore[union-attr]
    assert fds.statistics.epoch == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_sums_in_place_equal_two_passes_and_constant_columns_have_no_variance(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features, places = torch.randn(9000, 4, generator=generator) + offset, torch.randint(0, 7, (9000,), generator=generator)
    features[:, 2] = 0.1  # not a number of the binary system
    features[places == 3, 1] = 0  # a dead unit for these labels alone
    found, bit_by_bit = moments(features, places, 8), MomentSums(8)
    for part, at in zip(features.split(100), places.split(100), strict=True):
        bit_by_bit.add(part, at)
    for result in (found, bit_by_bit.moments()):
        assert result is not None
        for place in range(7):
            own = features[places == place].double()
            assert result.count[place] == len(own)
            torch.testing.assert_close(result.mean[place], own.mean(0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.square[place], (own - own.mean(0)).square().sum(0), rtol=1e-9, atol=1e-12)
        assert not result.square[:, 2].any()
        assert not result.square[3, 1].any()
        assert not result.count[7]
        assert not result.mean[7].any()


def test_a_data_set_is_not_copied_with_its_sampler() -> None:
    class Large(Dataset):
        def __len__(self) -> int:
            return ALL

        def __getitem__(self, index: int) -> Any:
            return DATA[index]

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a data set may be large")

    class Holds(Sampler):
        def __init__(self, data: Dataset) -> None:
            self.data = data

        def __iter__(self) -> Iterator[int]:
            return iter(range(TRAINING))

        def __len__(self) -> int:
            return TRAINING

    data = Large()
    batches, _ = collected(DataLoader(data, 4, sampler=Holds(data)))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x, y: [[x, x], y], "^FDS: the batch's 0 is a list: expected a tensor; name the key .* by inputs"),
        (lambda x, y: [x, torch.zeros(5)], r"^FDS: features='body' puts out \(4, 5\) for labels \(5,\)"),
        (lambda x, y: [x, "labels"], "^FDS: the batch's 1 is a str"),
    ],
)
def test_batches_that_the_pass_could_not_read_are_refused_at_the_first_step(batch: Any, message: str) -> None:
    """And not at the end of the epoch."""

    class Lenient(Body):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps += 1
            return self(batch[0] if isinstance(batch[0], Tensor) else batch[0][0]).mean()

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.stepped = True

    module, loader = Lenient(), DataLoader(DATA, batch_size=4, collate_fn=lambda rows: batch(torch.stack([x for x, _ in rows]), 0))
    with pytest.raises(ValueError, match=message):
        tiny_trainer(max_epochs=1, callbacks=[FDS("body", last_bucket=ALL)]).fit(module, loader)
    assert not hasattr(module, "stepped")
