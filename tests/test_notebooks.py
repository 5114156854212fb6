"""The notebooks are true: they execute, and what is committed is what they put out, tidy, small, described and free of this machine.

``python notebooks/execute.py`` writes the outputs anew. Numbers may differ between machines, everything else must be equal.
"""

import base64
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat", reason='the notebooks need: pip install "lit-methods[notebooks]"')
pytest.importorskip("nbclient", reason='the notebooks need: pip install "lit-methods[notebooks]"')

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGER = ("01", "03", "04", "05")  # executed by `make test-slow` only; the others by `make test-all`
FILE_LIMIT, PICTURE_LIMIT = 700_000, 150_000  # bytes
MACHINE = re.compile(r"(?<![\w.<~])/(?:work|tmp|home|root|Users|private|var|opt|mnt)/|[A-Z]:\\\\Users|lit-methods-cache")


def load_execute() -> Any:
    """The module ``notebooks/execute.py``."""
    spec = importlib.util.spec_from_file_location("notebooks_execute", ROOT / "notebooks" / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = load_execute()


def stem(path: Path) -> str:
    return path.stem


def cells(notebook: Any, kind: str) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


# ---- what is committed -------------------------------------------------------------------------------------------------


def pictures(notebook: Any) -> list[tuple[int, bytes, str]]:
    """(cell, bytes, alternative text) of every picture among the outputs."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            for kind, content in output.get("data", {}).items():
                if kind.startswith("image/"):
                    found.append((number, base64.b64decode(content), output.get("metadata", {}).get(kind, {}).get("alt", "")))
    return found


def texts(notebook: Any) -> list[tuple[int, str]]:
    """(cell, text) of every text among the outputs."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            found += [(number, output.text)] if output.output_type == "stream" else []
            found += [(number, str(content)) for kind, content in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def faults(notebook: Any) -> list[str]:
    """What is wrong with the outputs of a committed notebook."""
    code = [(number, cell) for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    found = [] if [cell.execution_count for _, cell in code] == list(range(1, len(code) + 1)) else ["not executed from top to bottom"]
    for number, cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number}: ends with {output.ename}")
            elif output.output_type == "stream" and output.name != "stdout":
                found.append(f"cell {number}: {output.name}: {output.text[:80]}")
            elif kinds := {"text/html", "application/javascript"} & set(output.get("data", {})):
                found.append(f"cell {number}: {', '.join(kinds)}")
        if "execution" in cell.metadata:
            found.append(f"cell {number}: execution times")
    found += [f"cell {number}: {path[0]} is a path of a machine" for number, text in texts(notebook) if (path := MACHINE.search(text))]
    for number, content, alt in pictures(notebook):
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        if pixels.std() < 1:
            found.append(f"cell {number}: blank picture")
        if len(content) > PICTURE_LIMIT:
            found.append(f"cell {number}: picture of {len(content)} bytes")
        if len(alt.split()) < 4:
            found.append(f"cell {number}: picture without a description")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_committed_outputs_are_tidy(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= FILE_LIMIT
    assert faults(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_a_notebook_explains_itself_and_checks_something(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    prose = [cell.source for cell in cells(notebook, "markdown")]
    assert notebook.cells[0].cell_type == "markdown"
    assert re.match(r"# \w", prose[0])
    assert sum(len(re.findall(r"^# ", text, flags=re.M)) for text in map(without_code, prose)) == 1, "one title"
    assert len(re.findall(r"^## ", "\n".join(prose), flags=re.M)) >= 3
    assert len(prose) >= len(cells(notebook, "code")) / 2, "prose between the cells"
    assert sum("assert " in cell.source for cell in cells(notebook, "code")) >= 4


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_links_and_configs_of_a_notebook_exist(path: Path) -> None:
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    links = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://|#", target)]
    configs = re.findall(r"configs/[\w/]+\.yaml", text)
    assert configs
    assert [target for target in links if not (path.parent / target.partition("#")[0]).exists()] == []
    assert [config for config in configs if not (ROOT / config).is_file()] == []


def test_the_readme_lists_every_notebook() -> None:
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda cell: cell.update(execution_count=7), "top to bottom"),
        (lambda cell: cell.outputs.append(nbformat.v4.new_output("error", ename="ValueError")), "ends with ValueError"),
        (lambda cell: cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning")), "stderr"),
        (lambda cell: cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text="see /tmp/x/a.ckpt")), "path of a machine"),
        (lambda cell: cell.outputs.append(nbformat.v4.new_output("display_data", {"text/html": "<script>"})), "text/html"),
        (lambda cell: cell.outputs.append(picture(np.full((40, 40, 3), 255), "a white square and nothing else")), "blank"),
        (lambda cell: cell.outputs.append(picture(np.random.default_rng(0).integers(0, 255, (40, 40, 3)), "")), "description"),
        (lambda cell: cell.outputs.append(picture(np.random.default_rng(0).integers(0, 255, (400, 400, 3)), "a lot of noise")), "bytes"),
    ],
)
def test_an_untidy_output_is_found(change: Any, fault: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", execution_count=1)])
    assert faults(notebook) == []
    change(notebook.cells[0])
    assert any(fault in found for found in faults(notebook))


def picture(pixels: np.ndarray, alt: str) -> Any:
    """An output with a picture."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="png")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    return nbformat.v4.new_output("display_data", data, metadata={"image/png": {"alt": alt}})


# ---- the code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_the_code_is_clean(path: Path, tmp_path: Path) -> None:
    """Ruff reads notebooks, but leaves cells out that are written to a file: those are checked as the files that they become."""
    import yaml

    if importlib.util.find_spec("ruff") is None:
        pytest.skip('ruff is not installed: pip install "lit-methods[dev]"')
    files = [path]
    for cell in cells(nbformat.read(path, as_version=4), "code"):
        if written := re.match(r"%%writefile (\S+)\n", cell.source):
            file = tmp_path / written[1]
            file.write_text(cell.source[written.end() :] + "\n", encoding="utf-8")
            if file.suffix == ".yaml":
                assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)
            else:
                files.append(file)
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    # a warning filter must stand before the imports that warn; an assert may be a sentence
    for words in (["check", "--ignore", "E402,PT018"], ["format", "--check"]):
        done = subprocess.run([*ruff, *words, *rules, *map(str, files)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- execution ---------------------------------------------------------------------------------------------------------


def masked(text: str) -> str:
    """``text`` without what may differ between two runs: numbers, times, widths of columns."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?", "#", execute.scrub(text))).strip()


def outline(notebook: Any) -> list[tuple[str, list[Any]]]:
    """Per code cell its first line and, per output, type, kinds of content and masked text."""
    found = []
    for cell in cells(notebook, "code"):
        outputs: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                outputs.append((output.name, masked(output.text)))
            else:
                data = output.get("data", {})
                plain = masked(data.get("text/plain", ""))
                outputs.append((output.output_type, sorted(data), plain))
        found.append((cell.source.partition("\n")[0], outputs))
    return found


def test_masking_keeps_words_and_drops_numbers() -> None:
    assert masked("mIoU 0.123, run runs/a/20260101-120000 in 0:00:07\n") == masked("mIoU   9.1e-05, run runs/a/20271212-010203 in 1:10:00")
    assert masked("became right") != masked("became wrong")


def test_scrubbing_drops_paths_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute.tempfile, "gettempdir", lambda: "/var/tmp-x")
    text = f"\x1b[31m{ROOT}/docs/a.md {sys.prefix}/lib {Path.home()}/b /var/tmp-x/c\x1b[0m"
    assert execute.scrub(text) == "<repository>/docs/a.md <python>/lib ~/b <tmp>/c"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.name.startswith(LONGER) else pytest.mark.thorough) for path in NOTEBOOKS],
    ids=stem,
)
def test_a_notebook_executes_to_its_committed_outputs(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(path, tmp_path))
    fresh, _ = execute.execute(copy, tmp_path)  # another folder than the notebook's own
    assert faults(fresh) == []
    assert outline(fresh) == outline(nbformat.read(path, as_version=4))
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "it leaves files in the current folder"
