"""What a command saves of a module whose base has arguments of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from torch import nn

from lit_methods import GenotypeClassifier, ImageClassifier
from lit_methods.arguments import handed_on
from lit_methods.cli.hyperparameters import with_those_of_bases


class Base(LightningModule):
    def __init__(self, rate: float = 0.1, depth: int = 3, file: Path | None = None, network: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.network, self.read = network, dict(self.hparams)


class Child(Base):
    def __init__(self, rate: float = 0.2, width: int = 4) -> None:
        super().__init__(**handed_on(Base, locals(), depth=7, file=Path("there"), network=nn.Identity()))
        self.save_hyperparameters()


class Grandchild(Child):
    def __init__(self, width: int = 5) -> None:
        super().__init__(rate=0.5, width=width)
        self.save_hyperparameters()


def by_command(cls: type[LightningModule], **given: Any) -> LightningModule:
    """What Lightning's command makes: it knows the arguments in the config alone."""
    with with_those_of_bases(), _given_hyperparameters_context({"_class_path": "there", **given}, "somebody"):
        return cls(**given)


@pytest.mark.parametrize(("cls", "given"), [(Base, {"rate": 0.3}), (Child, {"rate": 0.3, "width": 6}), (Grandchild, {"width": 6})])
def test_hyperparameters_are_those_without_a_command(cls: Any, given: dict[str, Any], tmp_path: Path) -> None:
    module, plain = by_command(cls, **given), cls(**given)
    said = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
    assert said == {name: str(value) if isinstance(value, Path) else value for name, value in plain.hparams.items()}
    assert module.read["depth"] == plain.read["depth"], "the base reads its own arguments at once"
    assert module.hparams_initial == module.hparams
    torch.save(dict(module.hparams), tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["depth"] == plain.hparams["depth"]


def test_a_classifier_of_a_genotype_has_what_its_base_reads() -> None:
    with _given_hyperparameters_context({"num_classes": 4}, "somebody"):
        assert "nesterov" not in GenotypeClassifier(nn.Linear(2, 4), num_classes=4).hparams, "Lightning alone"
    found = by_command(GenotypeClassifier, network=nn.Linear(2, 4), num_classes=4)
    plain = GenotypeClassifier(nn.Linear(2, 4), num_classes=4)
    assert {name: value for name, value in found.hparams.items() if not name.startswith("_")} == dict(plain.hparams)
    assert set(plain.hparams) >= set(ImageClassifier(nn.Linear(2, 4)).hparams)


def test_nothing_is_left_behind() -> None:
    before = LightningModule.save_hyperparameters
    with with_those_of_bases():
        assert LightningModule.save_hyperparameters is not before
    assert LightningModule.save_hyperparameters is before
