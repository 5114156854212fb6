"""``lit new``: every form, in a copy of the repository and in a package of one's own; what it writes is linted and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forks import HANGS
from helpers import run_python
from lit_methods.catalog import PACKAGES, collect
from lit_methods.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FORMS = {  # form -> what it writes beside the golden files and the config
    "term": ["callbacks/metric_learning/{slug}.py", "tests/callbacks/metric_learning/test_{slug}_technique.py", "callbacks/__init__.pyi"],
    "callback": [
        "callbacks/metric_learning/{slug}/__init__.py",
        "callbacks/metric_learning/{slug}/core.py",
        "callbacks/metric_learning/{slug}/callback.py",
        "tests/callbacks/metric_learning/test_{slug}_technique.py",
        "callbacks/__init__.pyi",
    ],
    "module": [
        "lit_methods/metric_learning/__init__.py",
        "lit_methods/metric_learning/{slug}/__init__.py",
        "lit_methods/metric_learning/{slug}/core.py",
        "lit_methods/metric_learning/{slug}/module.py",
        "tests/metric_learning/test_{slug}_technique.py",
        "lit_methods/__init__.pyi",
    ],
    "datamodule": ["datamodules/metric_learning/{slug}.py", "tests/datamodules/test_{slug}.py", "datamodules/__init__.pyi"],
}
OF_A_TECHNIQUE = [
    "configs/{slug}.yaml",
    "tests/golden/test_{slug}.py",
    "tests/golden/data/{slug}/make.py",
    "tests/golden/data/{slug}/README.md",
]
TECHNIQUES = ("term", "callback", "module")
ENTRIES = """
import importlib
import pytest
from lit_methods.catalog import public_names, techniques

@pytest.mark.parametrize("slug", ["quiet_term", "quiet_callback", "quiet_module"])
def test_the_entry_stands_beside_the_class(slug):
    entry = techniques()[slug]
    module, _, name = entry.classes[0].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert public_names()[name] == module
    assert importlib.import_module(kind.__module__).TECHNIQUE == entry
    assert entry.draft
"""


def files_of(form: str) -> list[str]:
    return [path.format(slug=f"quiet_{form}") for path in FORMS[form] + (OF_A_TECHNIQUE if form in TECHNIQUES else [])]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ruff(folder: Path) -> None:
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "."]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANGS, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def run_tests(folder: Path, *words: str) -> str:
    """Output of pytest in a process from nothing: Lightning's parser would still know the classes of our own package."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANGS, check=False).stdout


def fill_in(core: Path) -> None:
    """Put a value where the skeleton says that there is none yet."""
    text = core.read_text()
    start = text.index("    raise NotImplementedError")
    argument = re.findall(r"^def \w+\((\w+): Tensor\)", text[:start], flags=re.M)[-1]
    core.write_text(f"{text[:start]}    return {argument}.square().sum()\n" + text[text.index("\n", start) + 1 :])


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository's packages in which our import names work from the folder itself; it is the current folder."""
    ignore = shutil.ignore_patterns("__pycache__", "*.npz", "*.md", "runs", "test_*")
    for folder in ("lit_methods", "callbacks", "datamodules", "configs", "tests/golden"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("pyproject.toml", *(f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_"))):
        shutil.copy(ROOT / file, tmp_path / file)
    for folder in ("callbacks", "datamodules", "configs"):
        (tmp_path / "lit_methods" / folder).symlink_to(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What makes a folder a checkout for ``lit new``, with two families and one technique; it is the current folder."""
    files = ["lit_methods/catalog.py", "callbacks/metric_learning/__init__.py", "callbacks/metric_learning/tcm.py", "pyproject.toml"]
    files += ["lit_methods/semi/__init__.py", *(f"{name}/__init__.pyi" for name in ("lit_methods", "callbacks", "datamodules"))]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for folder in ("configs", "tests/golden/data"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# what wants the maths: the loss in two dtypes, a run of the config, what it changes; one of attaching and taking off (steps: 0 and 2)
WANTS_MATHS = {"term": 5, "callback": 5, "module": 4}
NEEDS_NONE = {"term": 4, "callback": 4, "module": 4, "datamodule": 6, "entries": 3}
OWN = [path for form in FORMS for path in files_of(form) if "/test_" in path] + ["tests/test_entries.py"]


def write_every_form(folder: Path) -> None:
    for form in FORMS:
        words = ["new", f"quiet_{form}", "--form", form, "--family", "metric_learning", "--title", "Two Views of One Thing"]
        assert main([*words, "--class", f"Quiet{form.upper()}"]) == 0
    (folder / "tests" / "test_entries.py").write_text(ENTRIES)


def test_every_form_passes_the_linter_and_with_its_maths_the_tests(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(checkout)
    write_every_form(checkout)
    said = capsys.readouterr().out
    assert sorted(re.findall(r"^  (\S+/\S+)$", said, flags=re.M)) == sorted(path for form in FORMS for path in files_of(form))
    (checkout / "tests" / "test_entries.py").unlink()
    written = tree(checkout)
    assert written.keys() - before.keys() == {path for form in FORMS for path in files_of(form) if not path.endswith(".pyi")}
    assert {path for path in before if written[path] != before[path]} == {path for path in written if path.endswith("__init__.pyi")}
    assert not [path for path in written.keys() - before.keys() if b"$" in written[path]], "an unfilled placeholder"
    ruff(checkout)

    (checkout / "tests" / "test_entries.py").write_text(ENTRIES)
    for form in TECHNIQUES:
        fill_in(checkout / next(path for path in files_of(form) if path.endswith(("core.py", "_learning/quiet_term.py"))))
        fill_in(checkout / "tests" / "golden" / "data" / f"quiet_{form}" / "make.py")
    make = "import runpy, sys; [runpy.run_path(path, run_name='__main__') for path in sys.argv[1:]]"
    scripts = [f"tests/golden/data/quiet_{form}/make.py" for form in TECHNIQUES]
    made = run_python(["-c", make, *scripts], checkout, forget=("lit_methods",))
    assert made.returncode == 0, made.stderr
    filled = run_tests(checkout, *OWN)
    assert f"{sum(WANTS_MATHS.values()) + 3 * len(TECHNIQUES) + sum(NEEDS_NONE.values())} passed" in filled, filled
    assert "failed" not in filled
    (checkout / "tests" / "test_entries.py").unlink()
    ruff(checkout)


@pytest.mark.thorough
def test_every_form_passes_what_needs_no_maths_at_once(checkout: Path) -> None:
    write_every_form(checkout)
    unfilled = run_tests(checkout, *OWN)
    assert f"{sum(WANTS_MATHS.values()) + len(TECHNIQUES)} failed, {sum(NEEDS_NONE.values())} passed" in unfilled, unfilled
    assert "NotImplementedError: quiet_module_loss: write the paper's equation here" in unfilled
    assert "no golden case found" in unfilled


def test_short_and_long_names_pass_the_linter(bones: Path) -> None:
    for number, form in enumerate(FORMS):
        for slug, name, family in (("a", "A", "aa"), ("abcdefghij_klmnopqrst", "VICReg", "zz_somewhat_long_name")):
            words = ["--family", family, "--new-family", "--class", f"{name}{number}", "--title", "T" * 100]
            assert main(["new", f"{slug}{number}", "--form", form, *words]) == 0
    ruff(bones)


def test_what_a_draft_lacks_is_written_when_it_is_asked_for(bones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "quiet_term", "--form", "term", "--family", "semi"]) == 0
    before = tree(bones)
    assert main(["new", "quiet_term", "--complete"]) == 0
    new = {"configs/full/quiet_term.yaml", "configs/claims/quiet_term.yaml", "docs/techniques/quiet_term.md"}
    new.add("tests/trajectory/test_quiet_term.py")
    assert tree(bones).keys() - before.keys() == new
    assert "$" not in "".join((bones / path).read_text() for path in new)
    assert main(["new", "quiet_term", "--complete"]) == 2
    assert "exist" in capsys.readouterr().err
    assert main(["new", "quiet_tern", "--complete"]) == 2
    assert "quiet_term" in capsys.readouterr().err
    assert main(["new", "tcm", "--complete"]) == 2
    assert "no draft" in capsys.readouterr().err


def test_a_mistake_is_one_short_message_and_writes_nothing(bones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bones / "tests" / "golden" / "data" / "blocked").write_text("a file where a folder should be")
    (bones / "configs" / "there.yaml").touch()
    before = tree(bones)
    good = ["--form", "term", "--family", "semi"]
    for words, said in (
        (["Two-Views", *good], "lower-case"),
        (["class", *good], "lower-case"),
        (["quiet"], "--form term | callback | module | datamodule"),
        (["quiet", "--form", "tern", "--family", "semi"], "no form 'tern': --form term | callback"),
        (["quiet", "--form", "term"], "metric_learning"),
        (["quiet", "--form", "term", "--family", "semy"], "nearest: semi"),
        (["quiet", "--form", "term", "--family", "Semi"], "lower-case"),
        (["quiet", *good, "--class", "quiet"], "capital"),
        (["quiet", *good, "--title", 'a "quoted" title'], "quotes"),
        (["quiet", *good, "--package", "mine"], "is a checkout"),
        (["quiet", *good, "--class", "MLP"], "MLP is already listed in lit_methods"),
        (["tcm", *good, "--class", "Quiet"], "lit info tcm"),
        (["there", *good], "configs/there.yaml exists"),
        (["q" * 60, *good], "shorter"),
        (["blocked", *good], "nothing was written"),
    ):
        assert main(["new", *words]) != 0, words
        error = capsys.readouterr().err
        assert said in error, words
        assert "Traceback" not in error
        assert len(error.splitlines()) <= 3
        assert tree(bones) == before, words


def test_new_twice_is_refused(bones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["new", "quiet_twice", "--form", "module", "--family", "semi"]
    assert main(words) == 0
    before = tree(bones)
    assert main(words) == 2
    assert "QuietTwice is already listed" in capsys.readouterr().err
    assert tree(bones) == before
    found = collect(bones / ("lit_methods" if name == PACKAGES[0] else name.rpartition(".")[2]) for name in PACKAGES)
    assert found["quiet_twice"].draft


# ---- outside a checkout ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_elsewhere_it_makes_a_package_and_adds_to_it(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "notes.txt").write_text("somebody's")
    assert main(["new", "quiet_term", "--form", "term", "--title", "Quiet"]) == 0
    assert "cd lit_quiet_term && pip install -e ." in capsys.readouterr().out
    assert sorted(path.name for path in elsewhere.iterdir()) == ["lit_quiet_term", "notes.txt"]
    root = elsewhere / "lit_quiet_term"
    monkeypatch.chdir(root / "tests")  # anywhere below
    assert main(["new", "quiet_callback", "--form", "callback", "--class", "VICReg"]) == 0
    assert main(["new", "quiet_module", "--form", "module"]) == 0
    assert main(["new", "quiet", "--form", "datamodule"]) == 0
    stub = (root / "lit_quiet_term" / "__init__.pyi").read_text().splitlines()
    assert stub == [
        "from .quiet import QuietDataModule as QuietDataModule",
        "from .quiet_callback.callback import VICReg as VICReg",
        "from .quiet_module.module import QuietModule as QuietModule",
        "from .quiet_term import QuietTerm as QuietTerm",
    ]
    assert set(collect([root])) == {"quiet_term", "quiet_callback", "quiet_module"}
    assert (root / "lit_quiet_term" / "configs" / "quiet_module.yaml").is_file()
    ruff(root)
    monkeypatch.chdir(elsewhere)
    assert main(["new", "quiet_term", "--form", "term"]) == 2
    assert "exists: cd into it" in capsys.readouterr().err
    assert main(["new", "loud", "--form", "term", "--package", "torch"]) == 2
    assert "installed package" in capsys.readouterr().err


def test_a_project_of_ones_own_gets_an_entry_point(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "pyproject.toml").write_text('[project]\nname = "my-lab"\nversion = "1"\n\n[tool.other]\nname = "x"\n')
    before = tree(elsewhere)
    assert main(["new", "quiet_term", "--form", "term"]) == 2
    assert "my_lab/ or src/my_lab/" in capsys.readouterr().err
    assert tree(elsewhere) == before
    (elsewhere / "src" / "my_lab").mkdir(parents=True)
    (elsewhere / "src" / "my_lab" / "__init__.py").write_text("names = 'in my own way'\n")
    assert main(["new", "loud", "--form", "term", "--package", "other"]) == 2
    assert "leave --package out" in capsys.readouterr().err
    assert main(["new", "quiet_term", "--form", "callback"]) == 0
    assert main(["new", "other_term", "--form", "term"]) == 0
    text = (elsewhere / "pyproject.toml").read_text()
    assert text.count('[project.entry-points."lit_methods.techniques"]\nmy_lab = "my_lab"\n') == 1
    assert text.startswith('[project]\nname = "my-lab"')
    assert (elsewhere / "src" / "my_lab" / "__init__.py").read_text() == "names = 'in my own way'\n"
    found = collect([elsewhere])
    assert found["quiet_term"].classes == ("my_lab.quiet_term.callback.QuietTerm",)
    assert found["other_term"].classes == ("my_lab.other_term.OtherTerm",)
