"""``lit list --parts``: complete, true to the classes, in the docs, and no figure that isn't measured."""

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics

from lit_methods.catalog import public_names, techniques
from lit_methods.cli.main import main
from lit_methods.parts import KINDS, Part, parts

ROOT = Path(__file__).resolve().parents[2]
KIND = {
    "datamodule": pl.LightningDataModule,
    "host module": pl.LightningModule,
    "network": torch.nn.Module,
    "loss": torch.nn.Module,
    "metric": torchmetrics.Metric,
    "callback": pl.Callback,
}
BUILT: dict[str, dict[str, Any]] = {
    "MLP": {"widths": [64, 256, 10]},
    "TinyTowers": {"pretrain_steps": 0},
    "GenotypeNetwork": {"size": "tiny"},
    "SparseUNet": {"num_classes": 20},
    "CompactVideoDetector": {"num_classes": 4},
    "VideoCapsuleNet": {"num_classes": 24},
}


def test_every_public_class_is_a_part_or_the_main_class_of_a_technique() -> None:
    names = {part.name for part in parts()}
    main_classes = {entry.names[0] for entry in techniques().values()}
    assert set(public_names()) - names - main_classes - {"Technique", "load_shared"} == set()  # the last one is a function
    assert not names & main_classes
    assert {"OrderedCallback", "LossTerm", "MaskCallback", "LabelCorrection", "ClassificationDataModule"} <= {
        part.name for part in parts() if part.kind == "base class"
    }
    assert len(names) == len(parts())


@pytest.mark.parametrize("part", parts(), ids=lambda part: part.name)
def test_a_part_is_what_it_says(part: Part) -> None:
    module, _, name = part.path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert part.docstring.split() == (kind.__doc__ or "").split()
    assert part.line
    assert "``" not in part.line + part.shapes
    if part.kind in KIND:
        assert issubclass(kind, KIND[part.kind])
    if part.kind == "datamodule":
        assert part.shapes, f"{name}: its docstring has no paragraph `Batches: ...`"
    if part.kind == "network" and "->" in str(getattr(kind.forward, "__doc__", "")):
        assert "->" in part.shapes


def test_a_cost_is_measured() -> None:
    costs = {part.name: part for part in parts() if part.cost}
    assert {"MLP", "SmallConvNet", "CifarResNet", "CifarResNet18", "WideResNet"} <= set(costs)
    for name, part in costs.items():
        said = re.match(r"([\d.]+) (thousand|million) parameters", part.cost)
        assert said is not None, f"{name}: {part.cost}"
        module, _, _ = part.path.rpartition(".")
        count = sum(value.numel() for value in getattr(importlib.import_module(module), name)(**BUILT.get(name, {})).parameters())
        assert count / {"thousand": 1e3, "million": 1e6}[said[2]] == pytest.approx(float(said[1]), rel=0.05), name


def test_the_table_is_grouped_and_can_be_had_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--parts"]) == 0
    text = capsys.readouterr().out
    places = [text.index(heading) for heading in KINDS.values()]
    assert places == sorted(places)
    assert max(map(len, text.splitlines())) <= 140
    for part in parts():
        assert re.search(rf"^  {part.name} ", text, flags=re.M)
    assert 'batch: {"image": (B, 1, 8, 8) float32 in [0, 1], "label": (B,) int64 in 0..9}' in text
    assert "cost: 4.4 thousand parameters" in text
    assert main(["list", "--parts", "--family", "segmentation", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"NoisyMasksDataModule", "ImageSegmentor", "SmallUNet2d"} <= {part["name"] for part in found}
    assert {part["family"] for part in found} == {"segmentation"}
    assert main(["list", "--parts", "--family", "segmentatoin"]) == 2
    assert "segmentation" in capsys.readouterr().err


def test_the_site_has_the_same_table() -> None:
    pytest.importorskip("mkdocs", reason="the extra docs isn't installed")
    spec = importlib.util.spec_from_file_location("docs_hooks_of_parts", ROOT / "docs" / "tools" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.generated_pages()["parts.md"]
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| class")]
    assert len(rows) == len(parts())
    for part, row in zip(parts(), rows, strict=True):
        assert f"`{part.name}`" in row or f"`{part.path}`" in row
        assert len(re.findall(r"(?<!\\)\|", row)) == 6, row
    assert {"Guide", "parts.md"} <= {"Guide", *dict(hooks.NAVIGATION)["Guide"]}
