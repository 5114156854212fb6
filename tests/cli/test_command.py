"""The light commands: list, info, cp, export, help; none of them needs a model."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forks import HANGS
from lit_methods.catalog import techniques
from lit_methods.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


LIGHT = (
    ["list"],
    ["list", "--parts"],
    ["list", "--configs"],
    ["--help"],
    ["--version"],
    ["info", "superflow"],
    ["info", "sparsity"],
    ["info", "LossTerm"],
    ["fit", "--help"],
    ["fot"],
    ["cp", "nothing", "x"],
    ["new", "Two-Views", "--form", "term"],
)


def test_light_commands_import_neither_torch_nor_lightning(tmp_path: Path) -> None:
    """One behind the other in one process: what one imports, the next would find."""
    code = (
        "import json, sys; from lit_methods.cli.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    main(words)\n"
        "    heavy = {'torch', 'lightning', 'numpy', 'jsonargparse', 'wandb', 'rich'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{words} imported {heavy}')\n"
    )
    command = [sys.executable, "-c", code, json.dumps(LIGHT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["list"], ["info", "tcm"]])
def test_a_listing_takes_less_than_two_cpu_seconds(words: list[str], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lit_methods", *words], cwd=tmp_path, capture_output=True, timeout=HANGS, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "lit fit --config" in text
    assert len(text.splitlines()) < 40
    assert main([]) == 0
    assert capsys.readouterr().out == text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lit-methods ")


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == 2
    assert "export" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["slug", "family", "form", "class", "title", "arXiv"]
    rows = [line.split()[:4] for line in lines[1 : 1 + len(techniques())]]
    assert rows == [[slug, entry.family, entry.form, entry.names[0]] for slug, entry in techniques().items()]
    assert main(["list", "--family", "lidar", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {entry["slug"] for entry in entries} == {slug for slug, technique in techniques().items() if technique.family == "lidar"}
    assert next(entry for entry in entries if entry["slug"] == "superflow")["arxiv"] == "2503.19912"
    assert main(["list", "--family", "lidr"]) == 2
    assert "lidar" in capsys.readouterr().err


def test_list_of_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--configs", "--json"]) == 0
    heads = {entry["path"]: entry["head"] for entry in json.loads(capsys.readouterr().out)}
    assert set(heads) == {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    silent = [path for path, head in heads.items() if not head]
    assert not silent, "their first line doesn't say what they are"
    assert main(["list", "--configs", "--family", "semi"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert {"configs/shrinkmatch.yaml", "configs/full/simmatchv2_imagenet.yaml"} <= set(shown)
    assert "configs/superflow.yaml" not in shown
    assert main(["list", "--configs", "--family", "semy"]) == 2
    assert "semi" in capsys.readouterr().err
    assert main(["list", "--configs", "--parts"]) == 2


def test_info_of_a_family_and_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "lidar"]) == 0
    text = capsys.readouterr().out
    for part in ("superflow (SuperFlow,", "configs/superflow_probe.yaml", "configs/full/superflow_vits.yaml", "PointSegmentor", "MinkUNet"):
        assert part in text
    assert main(["info", "lidar", "--json"]) == 0
    assert [entry["slug"] for entry in json.loads(capsys.readouterr().out)] == [
        t.slug for t in techniques().values() if t.family == "lidar"
    ]
    assert main(["info", "DigitsDataModule"]) == 0
    assert "num_train: Images of the training part" in capsys.readouterr().out
    assert main(["info", "TCM"]) == 0
    assert capsys.readouterr().out.startswith("tcm: Threshold-Consistent")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "superflow"]) == 0
    text = capsys.readouterr().out
    for part in (
        "https://arxiv.org/abs/2503.19912",
        "lit fit --config configs/superflow.yaml",
        "SuperFlow",
        *techniques()["superflow"].golden,
    ):
        assert part in text
    assert main(["info", "epg"]) == 0
    assert capsys.readouterr().out.count("Norm of the gradient") == 1, "a panel of both its modules is named once"
    assert main(["info", "superflw"]) == 2
    error = capsys.readouterr().err
    assert "superflow" in error
    assert len(error.splitlines()) <= 3


def test_cp_copies_a_shipped_config_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cp", "configs/trainer/cpu.yaml", "mine/cpu.yaml"]) == 0
    shipped = (ROOT / "configs" / "trainer" / "cpu.yaml").read_text()
    assert Path("mine/cpu.yaml").read_text() == shipped
    Path("mine/cpu.yaml").write_text("edited")
    assert main(["cp", "configs/trainer/cpu.yaml", "mine"]) == 2
    assert "--force" in capsys.readouterr().err
    assert Path("mine/cpu.yaml").read_text() == "edited"
    assert main(["cp", "configs/trainer/cpu.yaml", "mine", "--force"]) == 0
    assert Path("mine/cpu.yaml").read_text() == shipped
    assert main(["cp", "configs/trainer/cpuu.yaml", "mine"]) == 2
    assert "configs/trainer/cpu.yaml" in capsys.readouterr().err


def test_the_current_folder_comes_before_the_shipped_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs/trainer").mkdir(parents=True)
    Path("configs/trainer/cpu.yaml").write_text("mine: 1")
    assert main(["cp", "configs/trainer/cpu.yaml", "copy.yaml"]) == 0
    assert Path("copy.yaml").read_text() == "mine: 1"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run.ckpt"
    weights = {"backbone_3d.weight": torch.arange(6.0).view(2, 3), "backbone_3d.bias": torch.ones(2), "head.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": weights, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, path)
    return path


def test_export_writes_plain_tensors(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "out.pt")]) == 0
    weights = torch.load(tmp_path / "out.pt", weights_only=True)
    assert sorted(weights) == ["backbone_3d.bias", "backbone_3d.weight", "head.weight"]
    assert torch.equal(weights["backbone_3d.weight"], torch.arange(6.0).view(2, 3))
    assert not list(tmp_path.glob("*.partial"))


def test_export_strips_a_prefix(checkpoint: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    assert main(["export", str(checkpoint), str(tmp_path / "out.safetensors"), "--prefix", "backbone_3d."]) == 0
    weights = safetensors.load_file(tmp_path / "out.safetensors")
    layer = torch.nn.Linear(3, 2)
    layer.load_state_dict(weights)
    assert torch.equal(layer.bias, torch.ones(2))


def test_export_refuses_with_a_reason(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.pt")

    def error(*words: str) -> str:
        assert main(["export", *words]) != 0
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert len(text.splitlines()) <= 3
        return text

    assert "run.ckpt" in error(str(tmp_path / "rum.ckpt"), out)
    assert "backbone_3d." in error(str(checkpoint), out, "--prefix", "backbone.")
    assert "must end in" in error(str(checkpoint), str(tmp_path / "out.bin"))
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:700])
    assert "cut off" in error(str(tmp_path / "cut.ckpt"), out)
    (tmp_path / "text.ckpt").write_text("no checkpoint at all")
    assert "no checkpoint" in error(str(tmp_path / "text.ckpt"), out)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.ckpt")
    assert "state_dict" in error(str(tmp_path / "other.ckpt"), out)
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {"folder": Path("x")}}, tmp_path / "objects.ckpt")
    assert "holds more than" in error(str(tmp_path / "objects.ckpt"), out)
    (tmp_path / "sharded.ckpt").mkdir()
    assert "consolidate_checkpoint" in error(str(tmp_path / "sharded.ckpt"), out)
    assert not Path(out).exists()
    Path(out).write_text("precious")
    assert "--force" in error(str(checkpoint), out)
    assert Path(out).read_text() == "precious"
