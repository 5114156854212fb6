"""Runs of release 0.1 go on: their resolved configs load with the values that they hold, and their checkpoints resume.

``tests/data/runs_of_0.1`` has what 0.1 wrote: a run's ``config.yaml`` as ``<name>.yaml``, and as ``<name>.ckpt`` a checkpoint of
it, killed after the first of two steps.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_methods.cli.main import main

FOLDER = Path(__file__).parent / "data" / "runs_of_0.1"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
CHECKPOINTS = sorted(FOLDER.glob("*.ckpt"))


def differing(old: Any, new: Any, place: str = "") -> list[str]:
    """Places where ``new`` lacks something of ``old`` or holds another value; arguments that came later are no difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [text for key, value in old.items() for text in differing(value, new.get(key, "nothing"), f"{place}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for i, (a, b) in enumerate(zip(old, new, strict=True)) for text in differing(a, b, f"{place}.{i}")]
    return [] if old == new else [f"{place[1:]}: {old!r} became {new!r}"]


def test_there_are_some() -> None:
    assert len(CONFIGS) >= 12
    assert len(CHECKPOINTS) >= 5


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_resolved_config_of_an_earlier_release_loads(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(config), "--print_config"]) == 0
    assert differing(yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)) == []


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.stem)
def test_a_checkpoint_of_an_earlier_release_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    before = torch.load(checkpoint, weights_only=True)
    words = ["--config", str(checkpoint.with_suffix(".yaml")), "--ckpt_path", str(checkpoint), "--run_root", str(tmp_path)]
    assert main(["fit", *words]) == 0
    (last,) = tmp_path.glob("*/*/checkpoints/last.ckpt")
    after = torch.load(last, weights_only=True)
    assert (before["global_step"], after["global_step"]) == (1, 2)
    assert set(after["state_dict"]) == set(before["state_dict"]), "the names of weights stay"
    assert set(before["callbacks"]) <= set(after["callbacks"]), "each callback has found its state"
    assert any(not torch.equal(value, before["state_dict"][name]) for name, value in after["state_dict"].items())
