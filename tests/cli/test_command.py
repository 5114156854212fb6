"""The light commands: list, info, cp, export, new, help; none of them needs a model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import run_python
from lit_methods.catalog import techniques
from lit_methods.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def lit(*words: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_methods", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=check)


@pytest.mark.parametrize(
    "words", [["list"], ["--help"], ["--version"], ["info", "superflow"], ["fit", "--help"], ["fot"], ["cp", "nothing", "x"]]
)
def test_light_commands_import_neither_torch_nor_lightning(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from lit_methods.cli.main import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse', 'wandb', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


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
    assert lines[0].split() == ["slug", "family", "form", "title", "arXiv"]
    assert [line.split()[0] for line in lines[1 : 1 + len(techniques())]] == list(techniques())
    assert main(["list", "--family", "lidar", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {entry["slug"] for entry in entries} == {slug for slug, technique in techniques().items() if technique.family == "lidar"}
    assert next(entry for entry in entries if entry["slug"] == "superflow")["arxiv"] == "2503.19912"
    assert main(["list", "--family", "lidr"]) == 2
    assert "lidar" in capsys.readouterr().err


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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository's packages in which our import names work from the folder itself."""
    ignore = shutil.ignore_patterns("__pycache__", "*.npz", "runs")
    for folder in ("lit_methods", "callbacks", "datamodules", "configs", "tests/golden"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    for folder in ("callbacks", "datamodules", "configs"):
        (tmp_path / "lit_methods" / folder).symlink_to(tmp_path / folder)
    return tmp_path


FORMS = {"callback": ("callbacks", "tests/callbacks/metric"), "module": ("lit_methods", "tests/metric")}


def test_new_writes_skeletons_that_list_themselves_and_fail_their_own_tests(checkout: Path) -> None:
    for form, (home, tests) in FORMS.items():
        slug, name = f"two_views_{form}", f"TwoViews{form.capitalize()}"
        words = ["new", slug, "--form", form, "--family", "metric", "--title", "Two Views of One Thing"]
        said = lit(*words, cwd=checkout).stdout
        written = [
            f"{home}/metric/{slug}.py",
            f"configs/{slug}.yaml",
            f"configs/claims/{slug}.yaml",
            f"tests/golden/test_{slug}.py",
            f"{tests}/test_{slug}_technique.py",
            f"docs/techniques/{slug}.md",
            f"{home}/metric/__init__.py",
            f"{home}/__init__.pyi",
        ]
        for path in written:
            assert (checkout / path).is_file(), path
            assert path in said
            assert "$" not in (checkout / path).read_text()
        assert [slug, "metric", form] in [line.split()[:3] for line in lit("list", cwd=checkout).stdout.splitlines()]
        again = lit(*words, cwd=checkout, check=False)
        assert again.returncode == 2
        assert f"{name} is already listed" in again.stderr

    def run_tests(*folders: str) -> subprocess.CompletedProcess[str]:
        return run_python(["-m", "pytest", "-q", "-p", "no:cacheprovider", *folders], checkout, forget=("lit_methods",))

    unit = [tests for _, tests in FORMS.values()]
    unfilled = run_tests("tests/golden/test_two_views_callback.py", "tests/golden/test_two_views_module.py", *unit)
    assert "8 failed, 2 passed" in unfilled.stdout, unfilled.stdout  # the refusal of a wrong shape is written already
    assert "NotImplementedError: two_views_module_loss: write the paper's equation here" in unfilled.stdout
    assert "no golden case found" in unfilled.stdout

    for form, (home, _) in FORMS.items():  # filled in, the skeletons work
        core = checkout / home / "metric" / f"two_views_{form}.py"
        text = core.read_text()
        start = text.index("    raise NotImplementedError")
        value = f"    return {'weights' if form == 'callback' else 'features'}.square().sum()\n"
        core.write_text(text[:start] + value + text[text.index("\n", start) + 1 :])
    filled = run_tests(*unit)
    assert "8 passed" in filled.stdout, filled.stdout


def test_new_refuses_what_it_can_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "two_views", "--form", "callback"]) == 2
    assert "checkout" in capsys.readouterr().err
    assert main(["new", "Two-Views", "--form", "callback"]) == 2
    assert "lower-case" in capsys.readouterr().err
    assert main(["new", "two_views"]) == 2
    assert "--form" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
