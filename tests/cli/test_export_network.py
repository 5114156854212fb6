"""``lit export --format onnx | torch-export``: one graph for any batch that gives what the module gives, or a message that says why not."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_methods import MLP, ImageClassifier
from lit_methods.cli.main import main


class TwoInputs(nn.Module):
    """A network that can't be called with one tensor; its part can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.inner(x) + other


class ByValue(nn.Module):
    """A network whose way depends on the numbers, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(x.sum() > 0) else -self.inner(x)


def run_with(folder: Path, network: str, state: nn.Module) -> Path:
    """A run's folder as ``lit fit`` leaves it, without the training; its checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"model:\n  class_path: lit_methods.ImageClassifier\n  init_args:\n    num_classes: 10\n    network: {network}\n"
        "data:\n  class_path: lit_methods.datamodules.DigitsDataModule\n"
    )
    module = ImageClassifier(state, num_classes=10)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": module.state_dict(), "epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.0"}, checkpoint)
    return checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return run_with(tmp_path / "run", "{class_path: lit_methods.MLP, init_args: {widths: [64, 16, 10]}}", MLP([64, 16, 10]))


def module_of(checkpoint: Path) -> ImageClassifier:
    module = ImageClassifier(MLP([64, 16, 10]), num_classes=10).eval()
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return module


def test_a_graph_of_torch_export_needs_nothing_of_ours(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "network.pt2"
    assert main(["export", str(checkpoint), str(out), "--format", "torch-export"]) == 0
    said = capsys.readouterr().out
    assert "ImageClassifier, 1,210 parameters, input (batch, 1, 8, 8) float32" in said
    assert "differs from the module by 0.0e+00" in said
    facts = {"origin.json": ""}
    network = torch.export.load(out, extra_files=facts).module()
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(network(images), module_of(checkpoint)(images))
    assert "ImageClassifier" in json.loads(facts["origin.json"])["config"]
    assert main(["export", str(checkpoint), str(out), "--format", "torch-export"]) == 2, "nothing is overwritten"


def test_a_part_with_a_shape_of_its_own_in_onnx(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason='ONNX needs: pip install "lit-methods[onnx]"')
    runtime = pytest.importorskip("onnxruntime", reason='ONNX needs: pip install "lit-methods[onnx]"')
    out = tmp_path / "part.onnx"
    assert main(["export", str(checkpoint), str(out), "--format", "onnx", "--part", "network", "--shape", "1", "8", "8"]) == 0
    assert "MLP (network)" in capsys.readouterr().out
    session = runtime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 1, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module_of(checkpoint).network(images), rtol=1e-4, atol=1e-5)
    assert "config" in session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out.onnx", "--format", "torch-export"], "must end in .pt2"),
        (["out.pt2", "--format", "torch-export", "--part", "netwrok"], "has no part 'netwrok'\n  nearest: network"),
        (["out.pt2", "--format", "torch-export", "--shape", "3", "5"], "can't be called with a tensor (3, 3, 5)"),
        (["out.pt2", "--format", "torch-export", "--tokens", "5"], "goes with --shape"),
        (["out.pt", "--part", "network"], "parts of the weights: --prefix"),
    ],
)
def test_mistakes_are_told(checkpoint: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / words[0]), *words[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [(TwoInputs, 2, "missing 1 required positional argument: 'other'"), (ByValue, 1, "can't be written as one graph for any batch")],
)
def test_what_is_no_plain_network_is_refused_with_its_parts(
    kind: type[nn.Module], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_with(tmp_path / "run", f"{{class_path: {__name__}.{kind.__name__}}}", kind())
    shape = ["--shape", "3", "--part", "network"]
    assert main(["export", str(checkpoint), str(tmp_path / "out.pt2"), "--format", "torch-export", *shape]) == status
    said = capsys.readouterr().err
    assert message in said
    assert "give --part with one of inner" in said.replace("--shape of its input without the batch, or ", "give ").replace(
        "give give", "give"
    )
    assert not (tmp_path / "out.pt2").exists()
    words = ["--format", "torch-export", "--shape", "3", "--part", "network.inner"]
    assert main(["export", str(checkpoint), str(tmp_path / "out.pt2"), *words]) == 0


def test_a_checkpoint_outside_of_a_run_says_what_is_missing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(checkpoint.read_bytes())
    assert main(["export", str(alone), str(tmp_path / "out.pt2"), "--format", "torch-export"]) == 2
    assert "isn't in a run's folder with its config.yaml" in capsys.readouterr().err
