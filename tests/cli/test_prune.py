"""lit prune: a Hugging Face folder or a state dict, and what is refused before anything is written."""

import json
from pathlib import Path

import pytest
import torch

from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.cli.main import main

DIGITS = ["--config", "configs/dsnot.yaml", "--trainer.accelerator", "cpu"]
LANGUAGE = ["--config", "configs/dsnot_lm.yaml", "--trainer.accelerator", "cpu", "--trainer.callbacks.samples", "4"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_state_dict_is_written_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *DIGITS, "--trainer.callbacks.pattern", "2:4", "out.pt"]) == 0
    weights = torch.load("out.pt", weights_only=True)
    assert all(is_nm(weights[f"network.layers.{index}.weight"], 2, 4) for index in range(3))
    assert "DSnoT: 3 layers, post_training/density 0.5" in capsys.readouterr().out
    assert main(["prune", *DIGITS, "out.pt"]) == 2
    assert "out.pt exists" in capsys.readouterr().err


def test_a_folder_loads_in_plain_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    assert main(["prune", "pruned", *LANGUAGE]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("pruned")
    shares = [(part.weight == 0).float().mean() for name, part in model.model.layers.named_modules() if name.endswith("_proj")]
    assert len(shares) == 14
    assert all(share == pytest.approx(0.6, abs=0.01) for share in shares)
    (said,) = json.loads(Path("pruned/pruning.json").read_text())
    assert said["method"] == "DSnoT"
    assert len(said["density"]) == len(said["layers"]) == 14


def test_compressed_tensors_reads_back_what_was_written() -> None:
    pytest.importorskip("compressed_tensors.compressors.sparse_compressors", reason="needs compressed-tensors 0.10")
    transformers = pytest.importorskip("transformers")
    from compressed_tensors import ModelCompressor

    two_four = [*LANGUAGE, "--trainer.callbacks.pattern", "2:4"]
    assert main(["prune", "small", *two_four, "--compressed"]) == 0
    assert main(["prune", "plain", *two_four]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained("plain")
    read = transformers.AutoModelForCausalLM.from_config(plain.config)
    ModelCompressor.from_pretrained("small").decompress("small", read)
    for name, weight in plain.state_dict().items():
        if name.endswith("_proj.weight"):
            assert is_nm(weight, 2, 4)
            assert torch.equal(read.state_dict()[name], weight)
    small, large = (Path(folder, "model.safetensors").stat().st_size for folder in ("small", "plain"))
    assert small < 0.65 * large


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*DIGITS], "needs a config and the place to write to"),
        (["--trainer.max_epochs", "3", "out.pt"], "needs a config and the place to write to"),
        ([*DIGITS, "out.pt", "--compressed"], "but out.pt is a file"),
        ([*DIGITS, "out"], "holds 0 models of transformers"),
        (["--config", "configs/random_pruning.yaml", "out.pt"], "no callback that prunes"),
        ([*DIGITS, "--trainer.callbacks.targets", "[nothing.*]", "out.pt"], "matches no submodule"),
        ([*DIGITS, "--trainer.callbacks.pattern", "2:5", "out.pt"], "2:5 doesn't fit a layer of 64 inputs"),
        ([*DIGITS, "--trainer.callbacks.samples", "0", "out.pt"], "samples"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *words]) != 0
    err = capsys.readouterr().err
    assert said in err.rpartition("error: ")[2], "the last words are the message"
    assert not list(Path().glob("out*"))


def test_help_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--help"]) == 0
    assert "usage: lit prune" in capsys.readouterr().out
