"""Techniques of other packages: an installed one is listed, described, parsed by short name, trained; a broken one costs one line."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forks import HANGS
from lit_methods import catalog
from lit_methods.cli.main import main


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path, as site-packages is; what is imported from it is forgotten."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    catalog.plugins.cache_clear()
    yield folder
    catalog.plugins.cache_clear()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def install(site: Path, package: str, value: str = "") -> None:
    """What an installer leaves behind: the metadata with the entry point."""
    info = site / f"{package}-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(f"[lit_methods.techniques]\n{package} = {value or package}\n")
    importlib.invalidate_caches()
    catalog.plugins.cache_clear()


@pytest.fixture
def plugin(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package that ``lit new`` makes, its maths filled in, installed."""
    monkeypatch.chdir(site)
    assert main(["new", "calm_views", "--form", "term", "--package", "calm_methods", "--title", "Calm Views"]) == 0
    monkeypatch.chdir(site / "calm_methods")
    assert main(["new", "calm_host", "--form", "module"]) == 0
    (site / "calm_methods").rename(tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "project"))
    source = tmp_path / "project" / "calm_methods" / "calm_views.py"
    text = source.read_text()
    start = text.index("    raise NotImplementedError")
    text = text[:start] + "    return features.square().mean()\n" + text[text.index("\n", start) + 1 :]
    source.write_text(text.replace("draft=True", "draft=False"))
    install(site, "calm_methods")
    return tmp_path / "project"


def test_it_is_listed_and_described(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr()
    rows = {line.split()[0]: line for line in said.out.splitlines() if line}
    assert rows["calm_views"].split()[:4] == ["calm_views", "general", "callback", "CalmViews"]
    assert "draft: Calm host" in rows["calm_host"]
    assert said.err == ""
    assert main(["list", "--family", "general", "--json"]) == 0
    assert [entry["slug"] for entry in json.loads(capsys.readouterr().out)] == ["calm_host", "calm_views"]
    assert main(["info", "calm_views"]) == 0
    text = capsys.readouterr().out
    for part in ("calm_methods.CalmViews", "configs/calm_views.yaml", "panels     CalmViews", "--trainer.callbacks.help CalmViews"):
        assert part in text
    assert "github.com" not in text, "its page is not among ours"
    assert main(["info", "general"]) == 0
    assert "calm_host (CalmHost), draft" in capsys.readouterr().out


def test_its_configs_and_short_names_work(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--configs"]) == 0
    assert "configs/calm_views.yaml" in capsys.readouterr().out
    assert main(["cp", "configs/calm_views.yaml", "mine.yaml"]) == 0
    assert Path("mine.yaml").read_text() == (plugin / "calm_methods" / "configs" / "calm_views.yaml").read_text()
    words = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1", "--run_root", "runs"]
    assert main(["fit", "--config", "configs/calm_views.yaml", *words]) == 0
    (run,) = Path("runs/calm_views").iterdir()
    assert "calm_views/loss" in (run / "metrics.jsonl").read_text()
    assert "class_path: calm_methods.CalmViews" in (run / "config.yaml").read_text()
    assert main(["dashboard", "calm_views", "--dry-run"]) == 0
    assert "CalmViews" in capsys.readouterr().out
    assert main(["fit", "--config", "configs/calm_views.yaml", "--trainer.callbacks.wieght", "1"]) == 2
    assert "weight" in capsys.readouterr().err
    assert main(["fit", "--model", "CalmHosd"]) == 2
    assert "CalmHosd" in capsys.readouterr().err


def test_ours_alone_are_ours(plugin: Path) -> None:
    """What the tests and the site of this repository walk through doesn't depend on what else is installed."""
    assert "calm_views" not in catalog.techniques()
    assert "CalmViews" not in catalog.public_names()
    assert set(catalog.installed_techniques()) - set(catalog.techniques()) == {"calm_views", "calm_host"}
    assert set(catalog.installed_names()) - set(catalog.public_names()) == {"CalmViews", "CalmHost"}
    assert [entry.slug for entry in catalog.techniques_in(["CalmViews", "ImageClassifier"])] == ["calm_views"]
    assert set(catalog.published()) == {slug for slug, entry in catalog.techniques().items() if not entry.draft}


def test_listing_imports_neither_the_plugin_nor_torch(plugin: Path, site: Path) -> None:
    code = (
        "import sys; from lit_methods.cli.main import main; main(['list']); main(['info', 'calm_views']);"
        "sys.exit(f'{heavy}' if (heavy := {'torch', 'lightning', 'calm_methods'} & set(sys.modules)) else 0)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(plugin)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    assert "calm_views" in done.stdout


def break_syntax(site: Path) -> str:
    (site / "sad_methods" / "views.py").write_text("TECHNIQUE = Technique(\n")
    return "SyntaxError"


def break_field(site: Path) -> str:
    (site / "sad_methods" / "views.py").write_text("TECHNIQUE = Technique(slug='sad', colour='blue')\n")
    return "colour"


def break_literal(site: Path) -> str:
    (site / "sad_methods" / "views.py").write_text("TECHNIQUE = Technique(slug=name())\n")
    return "ValueError"


def break_slug(site: Path) -> str:
    entry = "slug='tcm', title='', arxiv='', family='f', form='callback', classes=(), configs=(), golden=(), claim='', summary=''"
    (site / "sad_methods" / "views.py").write_text(f"TECHNIQUE = Technique({entry})\n")
    return "'tcm' has the slug of one of lit-methods"


def break_encoding(site: Path) -> str:
    (site / "sad_methods" / "views.py").write_bytes(b"\xff\xfe Technique(")
    return "UnicodeDecodeError"


def break_package(site: Path) -> str:
    (site / "sad_methods" / "__init__.py").unlink()
    (site / "sad_methods").rmdir()
    return "no package 'sad_methods'"


@pytest.mark.parametrize("break_it", [break_syntax, break_field, break_literal, break_slug, break_encoding, break_package])
def test_a_broken_package_costs_one_line(
    break_it: Callable[[Path], str], plugin: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "sad_methods").mkdir()
    (site / "sad_methods" / "__init__.py").touch()
    reason = break_it(site)
    install(site, "sad_methods")
    for words in (["list"], ["info", "calm_views"], ["list", "--configs"], ["info", "tcm"]):
        assert main(words) == 0
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith("warning: the package sad_methods of sad-methods 0.3 is left out: ")
        assert reason in line
        assert "calm_views" in said.out or words[-1] == "tcm"
    assert set(catalog.installed_techniques()) == {*catalog.techniques(), "calm_views", "calm_host"}


def test_an_entry_point_of_a_class_says_what_it_must_be(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "sad_module.py").write_text("class Sad: ...\n")
    install(site, "sad_module", "sad_module:Sad")
    assert main(["list"]) == 0
    assert "must name one, not a module or a class" in capsys.readouterr().err


def test_a_module_that_does_not_import_is_named(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = plugin / "calm_methods" / "calm_views.py"
    source.write_text("raise RuntimeError('half done')\n" + source.read_text())
    assert main(["fit", "--config", "configs/calm_views.yaml", "--print_config"]) == 1
    error = capsys.readouterr().err
    assert "CalmViews can't be imported from the plugin calm_methods: RuntimeError: half done" in error
    assert "Traceback" not in error
