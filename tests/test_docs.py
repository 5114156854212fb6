"""What the documents say is true: their code runs, their commands parse, their links, paths and names exist, every config key is explained.

``python tests/test_docs.py`` writes the table of techniques into the README.

How a page is read: its fenced blocks run from top to bottom in one empty folder. A block whose first line is a comment with a file name
(``# my_project.py``) is also written to that file. Python blocks share one namespace. YAML blocks are parsed by ``lit fit --print_config``;
with the info string ``yaml fit`` they are trained for one batch, with ``yaml label_map`` they are read as a label map, with ``yaml sweep``
as a sweep. ``lit`` commands in bash blocks run, except that fit, validate, test and predict only parse, claims, compare and sweep only
plan, and dashboard sends nothing; what runs would have left behind is put into ``runs/<name>/<time>/``, so that later commands of the page
find it.
"""

import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_methods.catalog import family_title, published, techniques
from lit_methods.claims.records import verdict_over_all
from lit_methods.cli.main import RUN_COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND_PAGES = [*PAGES, ROOT / "configs" / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "notebooks" / "README.md"]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RUNNABLE = [path for path in CONFIGS if path.parent.name in ("configs", "full")]
SHIPPED = {path.relative_to(ROOT).as_posix() for path in RUNNABLE}
CLAIMS = [path for path in CONFIGS if path.parent.name in ("claims", "compare")]
LABEL_MAPS = [path for path in CONFIGS if path.parent.name == "label_maps"]
SPEAK_FOR_THEMSELVES = ("class_path", "claim", "source")
EXAMPLES = re.compile("two_views|/metric/|^my_|^runs/")  # paths that only an example has
ONLY_SHOWN = {
    "sweep": "--plan",
    "claims": "--plan",
    "compare": "--plan",
    "dashboard": "--dry-run",
    "push": "--help",
    "pull": "--help",
}  # what keeps a command from hours of work or a service
OTHER_PROGRAMS = ("cd", "git", "make", "pip", "pytest", "python", "ruff", "tensorboard", "wandb")


# ---- reading pages ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: the words of its info string, its text, the line of its first line."""

    info: tuple[str, ...]
    text: str
    line: int

    @property
    def file_name(self) -> str | None:
        """The file that the first line names in a comment."""
        found = re.match(r"#\s*([\w./-]+\.(?:py|yaml))\s*(?:\n|$)", self.text)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: A block has no language, or no end.
    """
    found: list[Block] = []
    info, body, start = None, [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            body.append(line)
        elif info is None:
            info, body, start = tuple(line[3:].split()), [], number + 1
            if not info:
                raise ValueError(f"{page}:{number}: the block has no language: write ```text for plain text")
        else:
            found.append(Block(info, "\n".join(body) + "\n", start))
            info = None
    if info is not None:
        raise ValueError(f"{page}:{start - 1}: the block has no end")
    return found


def without_blocks(page: Path) -> str:
    """The prose of a page."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(block: Block) -> Iterator[list[str]]:
    """Words of every command of a bash or console block, without comments; in a console block only lines that begin with ``$``."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        if block.info[0] == "console" and not line.startswith("$ "):
            continue
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- running pages ---------------------------------------------------------------------------------------------------------------------


def lit(words: list[str]) -> str:
    """Run the command in this process; its standard output.

    Raises:
        AssertionError: It failed; the message holds what it said.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    assert status == 0, f"lit {shlex.join(words)}\n{err.getvalue()[-3000:]}{out.getvalue()[-1000:]}"
    return out.getvalue()


def resolved(words: list[str]) -> str:
    """The resolved config of a ``lit fit | validate | test | predict`` command."""
    if len(words) == 3 and words[:2] == ["fit", "--config"] and words[2] in SHIPPED and not Path(words[2]).exists():
        return _resolved_alone(words[2])
    return _resolved(words)


@functools.cache
def _resolved_alone(config: str) -> str:
    """A shipped file by its name, without anything else: asked for by pages and by the test of all configs."""
    return _resolved(["fit", "--config", config])


def _resolved(words: list[str]) -> str:
    text = lit([*words, "--print_config"])
    assert "seed_everything:" in text, f"lit {shlex.join(words)} printed no config:\n{text[:500]}"
    return text


class Page:
    """Runs the blocks of a page in a folder of its own."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.namespace: dict[str, Any] = {"__name__": "docs_page"}

    def run(self) -> None:
        for block in blocks(self.page):
            try:
                self._run(block)
            except BaseException as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(f"in {page_id(self.page)}, line {block.line}")
                raise

    def _run(self, block: Block) -> None:
        language, *options = block.info
        if block.file_name:
            path = self.folder / block.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        if language == "python":
            # lines of the page in tracebacks
            code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.namespace)
        elif language == "yaml":
            self._run_yaml(block, options)
        elif language in ("bash", "console"):
            for words in commands(block):
                self._run_command(words)
        else:
            assert language == "text", f"language {language!r} isn't tested: use python, yaml, bash, console or text"

    def _run_yaml(self, block: Block, options: list[str]) -> None:
        path = self.folder / (block.file_name or f"block-{block.line}.yaml")
        path.write_text(block.text, encoding="utf-8")
        if options == ["label_map"]:
            from lit_methods.datamodules.driving.kitti import read_label_map

            assert read_label_map(path).table.max() >= 1
        elif options == ["fit"]:
            quick = "--trainer.limit_train_batches 1 --trainer.limit_val_batches 1 --trainer.accelerator cpu --run_root quick"
            lit(["fit", "--config", str(path), "--trainer.max_epochs", "1", *quick.split()])
            assert list(self.folder.glob(f"quick/{path.stem}/*/checkpoints/last.ckpt"))
        elif options == ["sweep"]:
            from lit_methods.sweeps.definition import read_sweep

            folder = self.folder / "runs" / "sweeps" / read_sweep(path).name
            folder.mkdir(parents=True)
            kept = {
                "name": folder.name,
                "method": "random",
                "metric": "loss",
                "goal": "minimize",
                "words": [],
                "parameters": [],
                "trials": [],
            }
            (folder / "sweep.json").write_text(json.dumps(kept), encoding="utf-8")
        else:
            assert not options, f"unknown options {options}"
            resolved(["fit", "--config", str(path)])

    def _run_command(self, words: list[str]) -> None:
        program, *rest = words
        if program == "lit" and rest[0] in RUN_COMMANDS and not any(word.endswith("help") for word in rest):
            self._leave_behind(rest, resolved(rest))
        elif program == "lit" and rest[0] == "new":
            new_technique(rest, self.folder, self.page)
        elif program == "lit" and rest[0] == "export" and {"onnx", "torch-export"} & set(rest):
            check_graph_export(rest)  # what is left behind here holds no network
        elif program == "lit" and rest[0] in ONLY_SHOWN:
            assert lit([*(word for word in rest if word != "--page"), ONLY_SHOWN[rest[0]]]).strip()
        elif program == "lit":
            assert lit(rest).strip()
        else:
            assert program in OTHER_PROGRAMS, f"unknown program {program!r}: {shlex.join(words)}"
            check_other(words)

    def _leave_behind(self, words: list[str], config: str) -> None:
        """Put config and checkpoint of the run where the page's next commands look for them."""
        import torch

        given = dict(zip(words, [*words[1:], ""], strict=True))
        first = words[words.index("--config") + 1] if "--config" in words else given.get("--model", "run")
        name = given.get("--name") or (Path(first).stem if first.endswith(".yaml") else first.rpartition(".")[2])
        run = self.folder / "runs" / name / "<time>"
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(config, encoding="utf-8")
        torch.save({"state_dict": {"backbone_3d.weight": torch.ones(2)}}, run / "checkpoints" / "last.ckpt")


def check_graph_export(words: list[str]) -> None:
    """The file's ending is that of the format."""
    from lit_methods.cli.network import SUFFIX

    assert words[2].endswith(SUFFIX[words[words.index("--format") + 1]])


def new_technique(words: list[str], folder: Path, page: Path) -> None:
    """Run ``lit new`` in the bare bones of a checkout; the page must name every file that it writes."""
    checkout = folder / "checkout"
    if "--complete" in words:  # of what an earlier block has begun
        return _run_new(words, folder, checkout, page)
    for name in ("lit_methods/catalog.py", "lit_methods/__init__.pyi", "callbacks/__init__.pyi", "datamodules/__init__.pyi"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    _run_new(words, folder, checkout, page)


def _run_new(words: list[str], folder: Path, checkout: Path, page: Path) -> None:
    os.chdir(checkout)
    try:
        written = re.findall(r"^  (\S+/\S+\.\w+)$", lit(words), flags=re.M)
    finally:
        os.chdir(folder)
    assert written
    for path in written:
        assert (checkout / path).is_file()
        assert f"`{path}`" in page.read_text(encoding="utf-8"), f"{page_id(page)} doesn't name {path}, which lit new writes"


def check_other(words: list[str]) -> None:
    """Targets of make, extras of pip, addresses of git and files of python and pytest exist."""
    program, *rest = words
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if program == "make":
        targets = re.findall(r"^([\w./-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        wanted = [word for word in rest if "=" not in word]
        assert set(wanted) <= set(targets), f"make {wanted}: the Makefile has {targets}"
    if program == "pip":
        extras = {extra for word in rest for listed in re.findall(r"\[([\w,]+)\]", word) for extra in listed.split(",")}
        missing = [extra for extra in extras if not re.search(rf"^{extra} = \[", pyproject, flags=re.M)]
        assert not missing, f"pyproject.toml has no extra {missing}"
    if program == "git" and rest[0] == "clone":
        assert f'"{rest[1]}"' in pyproject, f"{rest[1]} is not the address in pyproject.toml"
    if program == "python" and rest[:1] == ["-m"] and rest[1].startswith("lit_methods"):
        assert resolves(rest[1]), f"no module {rest[1]}"
    if program in ("python", "pytest"):
        files = [word.partition("::")[0] for word in rest if re.search(r"\.py(::|$)|^tests/", word)]
        missing = [file for file in files if "<" not in file and not (ROOT / file).exists()]
        assert not missing, f"{shlex.join(words)}: no {missing}"


def test_readme_names_every_extra() -> None:
    """Whoever reads the table of extras learns of all that pip can be asked for."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = pyproject.split("[project.optional-dependencies]")[1].split("\n[")[0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| extra | brings | for |")[1].split("\n\n")[0]
    extras = re.findall(r"^([\w-]+) = \[", listed, flags=re.M)
    missing = [extra for extra in extras if f"`{extra}`" not in table]
    assert len(extras) > 10
    assert not missing, f"README.md's table of extras lacks {missing}"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.usefixtures("forked_python")  # `lit claims --plan` resolves configs in a process of its own
@pytest.mark.parametrize("page", COMMAND_PAGES, ids=page_id)
def test_the_blocks_of_a_page_run(page: Path, workplace: Path) -> None:
    Page(page, workplace).run()


@pytest.mark.parametrize("form", ["term", "callback", "module", "datamodule"])
def test_the_checklist_names_what_lit_new_writes(form: str, workplace: Path) -> None:
    new_technique(["new", "two_views", "--form", form, "--family", "metric", "--new-family"], workplace, ROOT / "CONTRIBUTING.md")


@pytest.mark.parametrize(
    ("info", "text", "problem"),
    [
        ("python", "raise RuntimeError('broken example')\n", "broken example"),
        ("yaml", "model:\n  class_path: SuperFlow\n  init_args:\n    temprature: 1\n", "temperature"),
        ("bash", "lit fit --config configs/superflaw.yaml\n", "superflow.yaml"),
        ("bash", "lit infos superflow\n", "no command"),
        ("bash", "lit claims superflaw\n", "superflow"),
        ("bash", "lit dashboard superflaw\n", "superflow"),
        ("bash", "make superflaw\n", "superflaw"),
        ("bash", 'pip install ".[lidarr]"\n', "lidarr"),
        ("bash", "python -m pytest tests/test_nothing.py\n", "test_nothing"),
        ("bash", "rm -rf runs\n", "unknown program"),
        ("perl", "print 1\n", "perl"),
    ],
)
def test_a_wrong_block_is_found(info: str, text: str, problem: str, workplace: Path) -> None:
    page = ROOT / "docs" / "index.md"
    with pytest.raises(BaseException, match=problem):
        Page(page, workplace)._run(Block((info,), text, 1))


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=page_id)
def test_code_stands_between_fences(page: Path) -> None:
    """An indented block would be shown as code, and not be tested."""
    indented = re.findall(r"(?:\A|\n)\n((?: {4}|\t)\S.*)", without_blocks(page))
    assert not indented, f"write a fenced block instead of {indented[0]!r}"


# ---- links, paths, names ---------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*COMMAND_PAGES, ROOT / "CHANGELOG.md"], ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_and_names_in_the_text_exist(page: Path) -> None:
    """Paths such as `callbacks/averaging/ema.py`, names such as `lit_methods.panels.Curve`; patterns and <placeholders> are left out."""
    missing = []
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(page)):
        if re.fullmatch(r"(?:\w[\w.-]*/)+[\w.-]*\.(?:py|pyi|yaml|md|toml|template)", code) and not EXAMPLES.search(code):
            if not any((base / code).exists() for base in (ROOT, page.parent)):
                missing.append(code)
        elif re.fullmatch(r"lit_methods(?:\.\w+)+", code) and not resolves(code):
            missing.append(code)
    assert not missing


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


def test_names_that_are_gone_are_found() -> None:
    assert resolves("lit_methods.panels.Curve")
    assert resolves("lit_methods.callbacks.averaging.ema.EMATeacher.decay_at")
    assert not resolves("lit_methods.callbacks.emma")
    assert not resolves("lit_methods.panels.Curves")


# ---- the table of techniques -----------------------------------------------------------------------------------------------------------

TABLE = re.compile(
    r"(?<=<!-- techniques: written by `python tests/test_docs.py` from the catalogue -->\n).*?(?=<!-- /techniques -->)", re.S
)


def technique_table() -> str:
    """The catalogue as a Markdown table, family by family."""
    rows = ["| technique | what it does | form | [does its claim hold here?](docs/evidence.md) |", "|---|---|---|---|"]
    family = ""
    for entry in sorted(published().values(), key=lambda entry: (entry.family, entry.slug)):
        if entry.family != family:
            family = entry.family
            rows.append(f"| **{family_title(family)}** | | | |")
        name = f"[{entry.name}](docs/techniques/{entry.slug}.md)<br>`{entry.slug}`"
        paper = f" [arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else ""
        rows.append(f"| {name} | {entry.summary}{paper} | {entry.form} | {verdict_over_all(entry.slug)} |")
    return "\n".join(rows) + "\n"


@pytest.mark.catalogue
def test_the_readme_lists_the_catalogue() -> None:
    found = TABLE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None, "README.md has lost the comments around the table"
    assert found[0] == technique_table(), "run: python tests/test_docs.py"


@pytest.mark.catalogue
def test_every_technique_has_a_page() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "techniques").glob("*.md")}
    assert set(published()) <= pages <= set(techniques()), "a draft may have one, while it is being completed"


def test_the_readme_opens_with_the_two_commands() -> None:
    first = blocks(ROOT / "README.md")[0]
    assert [shlex.join(words) for words in commands(first)] == ["make superflow", "make test"]


# ---- configs ---------------------------------------------------------------------------------------------------------------------------


def unexplained_keys(text: str) -> list[str]:
    """Keys of a YAML text that have a value and neither a comment on their line nor a comment line directly above."""
    found, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        key = re.match(r"\s*(?:- )?([\w.+-]+):(?:\s+(.*))?$", line)
        if not key or line.lstrip().startswith("#"):
            continue
        value, _, comment = (key[2] or "").partition("#")
        opens = not value.strip() or key[1] in SPEAK_FOR_THEMSELVES
        above = number > 0 and lines[number - 1].lstrip().startswith("#")
        if not (opens or comment.strip() or above):
            found.append(f"line {number + 1}: {key[1]}")
    return found


def test_an_unexplained_key_is_found() -> None:
    text = "model:\n  class_path: A\n  init_args:\n    a: 1  # one\n    # two\n    b: 2\n    c: 3\n- d: 4\n"
    assert unexplained_keys(text) == ["line 7: c", "line 8: d"]


@pytest.mark.parametrize("config", [path for path in CONFIGS if path not in LABEL_MAPS + CLAIMS], ids=page_id)
def test_every_key_is_explained(config: Path) -> None:
    assert unexplained_keys(config.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("config", CLAIMS, ids=page_id)
def test_every_key_of_a_claim_is_explained(config: Path) -> None:
    """Inside the arms stand keys of the configs, which are explained there."""
    text = "\n".join(line for line in config.read_text(encoding="utf-8").splitlines() if line[:1].strip())
    assert unexplained_keys(text) == []


@pytest.mark.parametrize("config", LABEL_MAPS, ids=page_id)
def test_every_key_of_a_label_map_is_explained(config: Path) -> None:
    """The keys are the same everywhere: those without a comment are explained where they are read."""
    import yaml

    from lit_methods.datamodules.driving.kitti import LabelMap

    text = config.read_text(encoding="utf-8")
    explained = set(re.findall(r"^\s*(\w+):", inspect.cleandoc(LabelMap.__doc__ or ""), flags=re.M))
    bare = {line.split(": ")[1] for line in unexplained_keys(text)} & set(yaml.safe_load(text))
    assert text.startswith("# "), "say what the data set is, and what isn't verified"
    assert bare <= explained, f"neither a comment nor an entry in LabelMap's docstring: {sorted(bare - explained)}"


@pytest.mark.parametrize("config", RUNNABLE, ids=page_id)
def test_a_config_parses(config: Path, workplace: Path) -> None:
    assert "class_path: lit_methods." in resolved(["fit", "--config", page_id(config)])


@pytest.mark.parametrize("config", CONFIGS, ids=page_id)
def test_lists_are_extended_and_not_replaced(config: Path) -> None:
    """A plain ``callbacks:`` or ``logger:`` would silently drop those of an earlier file."""
    assert not re.findall(r"^\s*(?:callbacks|logger):", config.read_text(encoding="utf-8"), flags=re.M)


def test_the_head_of_a_config_names_its_command() -> None:
    for config in RUNNABLE:
        named = re.findall(r"^#\s+lit (?:fit|test|soup) --config (\S+)", config.read_text(encoding="utf-8"), flags=re.M)
        assert named, f"{page_id(config)} doesn't say how it is run"
        assert set(named) == {page_id(config)}


def test_the_citation_is_complete() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert f'version = "{citation["version"]}"' in pyproject
    assert f'license = "{citation["license"]}"' in pyproject
    assert citation["repository-code"] in pyproject
    assert f"{citation['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda _: technique_table(), readme.read_text(encoding="utf-8")), encoding="utf-8")
    print("README.md: the table of techniques is up to date")
