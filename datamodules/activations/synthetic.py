"""Made activations whose features are known: sparse mixtures of atoms, and sums of attributes' codes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.checks import at_least, literals, within
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule
from lit_methods.seeds import own_seed

Coefficients = Literal["uniform", "normal"]


class TensorBatches(Batches):
    """Samples that lie in memory as tensors of equal length, fetched a batch at a time.

    Args:
        tensors: Key of the batch -> (N, ...).
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """The chosen samples."""
        chosen = torch.from_numpy(index)
        return {name: values[chosen] for name, values in self.tensors.items()}


def unit_directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors, all directions as likely: (count, width) float32."""
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def sparse_codes(
    count: int, atoms: int, active: Sequence[int], generator: torch.Generator, coefficients: Coefficients = "uniform", signed: bool = False
) -> Tensor:
    """Codes with few entries other than 0, at places that are all as likely.

    Args:
        count: Samples N.
        atoms: n.
        active: Each sample has as many entries as one of these says, all as likely.
        generator: CPU generator.
        coefficients: ``uniform``: in [0.5, 1.5]. ``normal``: |N(1, 0.1)| over the square root of the sample's number of entries.
        signed: Half of the entries are negative.

    Returns:
        (N, n) float32.
    """
    entries = torch.tensor(active)[torch.randint(len(active), (count,), generator=generator)][:, None]
    chosen = torch.rand(count, atoms, generator=generator).argsort(dim=1).argsort(dim=1) < entries
    if coefficients == "uniform":
        values = 0.5 + torch.rand(count, atoms, generator=generator)
    else:
        values = (1 + 0.1 * torch.randn(count, atoms, generator=generator)).abs() / entries.sqrt()
    if signed:
        values = values * (2 * torch.randint(2, (count, atoms), generator=generator) - 1)
    return values * chosen


class SyntheticActivations(LoaderDataModule):
    """Base of made activations: drawn once by the seed, features and samples alike; validation and test see other samples of the same.

    They come from a seed of their own: after ``seed_everything`` with the same number a dictionary that begins with ``torch.randn`` would
    begin with the true features.
    """

    def __init__(self, num_train: int, num_val: int, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(1, num_train=num_train, num_val=num_val)
        self.num_train, self.num_val = num_train, num_val

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Samples, as batches have them."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Draw all samples."""
        if self.train_set is not None:
            return
        generator = torch.Generator().manual_seed(own_seed(type(self).__name__, self.seed))
        tensors = self.draw(self.num_train + self.num_val, generator)
        self.train_set = TensorBatches({name: values[: self.num_train] for name, values in tensors.items()})
        self.val_set = self.test_set = TensorBatches({name: values[self.num_train :] for name, values in tensors.items()})


class SparseMixturesDataModule(SyntheticActivations):
    """Activations x = z V: few of n random unit directions V are active in each sample. There is nothing to download.

    Batch: {"activation": (B, 32) float32, "code": (B, 128) float32}

    The defaults are sparse mixtures. Further settings of papers: signed axes, ``atoms: 24, active: [3], signed: true``; products of codes
    and features, ``atoms: 64, active: [3], coefficients: normal, unit_norm: true``; the same with unequal samples, ``width: 42,
    atoms: 128, active: [3, 20]``.

    Args:
        width: Size d of an activation.
        atoms: Number n of directions.
        active: Each sample has as many active directions as one of these numbers says, all as likely.
        coefficients: ``uniform``: in [0.5, 1.5]. ``normal``: |N(1, 0.1)| over the square root of the sample's number of directions.
        signed: Half of the coefficients are negative.
        unit_norm: Codes and activations are divided by one number, so that the mean norm of a training activation is 1.
        num_train: Training samples, drawn once.
        num_val: Validation samples, drawn once.
        batch_size: Samples per process and step.
        num_workers: Processes that read data; the samples lie in memory, so 0 is fastest.
        seed: Seed of directions, samples and order.

    Attributes:
        directions: (n, d) float32, the true unit directions, after ``setup``.

    Raises:
        ValueError: A number lies outside its range.
    """

    directions: Tensor

    def __init__(
        self,
        width: int = 32,
        atoms: int = 128,
        active: Sequence[int] = (2, 3, 4, 5, 6, 7, 8, 9, 10),
        coefficients: Coefficients = "uniform",
        signed: bool = False,
        unit_norm: bool = False,
        num_train: int = 51200,
        num_val: int = 4096,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_train, num_val, batch_size, num_workers, seed)
        literals(SparseMixturesDataModule, locals())
        at_least(1, width=width, atoms=atoms)
        if not active:
            raise ValueError("active is empty: give the numbers of active directions, such as [3]")
        for number in active:
            within(f"[1, {atoms}]", "active directions, at most all atoms,", active=number)
        self.save_hyperparameters()

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Activations and their true codes."""
        hp: Any = self.hparams
        self.directions = unit_directions(hp["atoms"], hp["width"], generator)
        code = sparse_codes(count, hp["atoms"], list(hp["active"]), generator, hp["coefficients"], hp["signed"])
        if hp["unit_norm"]:
            code = code / (code[: self.num_train] @ self.directions).norm(dim=1).mean()
        return {"activation": code @ self.directions, "code": code}


class CodeReadout(nn.Module):
    """A subject model that tells each attribute's value from an activation: by the code nearest to what is left without the other codes.

    Args:
        codes: Attribute -> (values, d) codes that it looks for.
    """

    def __init__(self, codes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(codes)
        self.codes = nn.ParameterList([nn.Parameter(code, requires_grad=False) for code in codes.values()])

    def forward(self, activation: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Attribute -> (B, values) logits: minus half the squared distance to each code, without what all codes share.

        Args:
            activation: (B, d).
            batch: With the (B,) values of all attributes, which say what the other codes are.
        """
        parts = [code[batch[name]] for name, code in zip(self.names, self.codes, strict=True)]
        rest = activation - torch.stack(parts).sum(0)
        named = zip(self.names, parts, self.codes, strict=True)
        return {name: (rest + part) @ code.T - code.square().sum(1) / 2 for name, part, code in named}


class AttributeSumsDataModule(SyntheticActivations):
    """Activations that are sums of a code for each attribute's value, and noise, like those of indirect object identification.

    Batch: {"activation": (B, 64) float32, "io": (B,) int64, "s": (B,) int64, "pos": (B,) int64}

    x = v_io + magnitude v_s + v_pos + noise, with a random unit vector for every value; all values as likely.

    Args:
        width: Size d of an activation.
        names: Values of ``io``, and of ``s``.
        magnitude: Norm of the codes of ``s``; the others' is 1.
        noise: Norm of the noise, about: its standard deviation in each coordinate is this over sqrt(width).
        num_train: Training samples, drawn once.
        num_val: Validation samples, drawn once.
        batch_size: Samples per process and step.
        num_workers: Processes that read data; the samples lie in memory, so 0 is fastest.
        seed: Seed of codes, samples and order.

    Attributes:
        codes: Attribute -> (values, d) float32, its true codes with their norm, after ``setup``.
        subject: A model that reads the values by these codes, after ``setup``.

    Raises:
        ValueError: A number lies outside its range.
    """

    codes: dict[str, Tensor]
    subject: CodeReadout

    def __init__(
        self,
        width: int = 64,
        names: int = 20,
        magnitude: float = 1.0,
        noise: float = 0.3,
        num_train: int = 4000,
        num_val: int = 1000,
        batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_train, num_val, batch_size, num_workers, seed)
        at_least(1, width=width)
        at_least(2, "values", names=names)
        within("[0, inf)", magnitude=magnitude, noise=noise)
        self.save_hyperparameters()

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Activations and the values of their attributes."""
        hp: Any = self.hparams
        values = {"io": hp["names"], "s": hp["names"], "pos": 2}
        self.codes = {name: unit_directions(number, hp["width"], generator) for name, number in values.items()}
        self.codes["s"] = self.codes["s"] * hp["magnitude"]
        self.subject = CodeReadout(self.codes)
        ids = {name: torch.randint(number, (count,), generator=generator) for name, number in values.items()}
        noise = torch.randn(count, hp["width"], generator=generator) * (hp["noise"] / hp["width"] ** 0.5)
        return {"activation": torch.stack([self.codes[name][index] for name, index in ids.items()]).sum(0) + noise, **ids}
