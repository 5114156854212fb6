"""``lit new``: skeletons of a technique or a datamodule, in a checkout of this repository or in a package of one's own."""

import argparse
import importlib.util
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from lit_methods.catalog import GROUP, PACKAGES, Technique, collect, installed_names, installed_techniques, stub_names
from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError, suggest

FORMS = {
    "term": "a loss term of features, labels or outputs, which joins the loss of any module: one file",
    "callback": "anything else that attaches to any module: core.py and callback.py",
    "module": "owns the training step: core.py and module.py",
    "datamodule": "data: one file",
}
_LONGEST = 140  # characters of a line, as the linter wants it
_INFRASTRUCTURE = ("cli", "claims", "reports", "runs", "tasks")

_ATTACH = {
    "module": """In Python:

```python
from lightning.pytorch import Trainer
from lit_methods import MLP, $class_name
from lit_methods.datamodules import DigitsDataModule

Trainer(max_epochs=1).fit($class_name(MLP([64, 64, 10])), datamodule=DigitsDataModule())
```""",
    "callback": """On your own module, without touching it:

```bash
lit fit --model lightning.pytorch.demos.boring_classes.BoringModel \\
    --data lightning.pytorch.demos.boring_classes.BoringDataModule \\
    --trainer.callbacks+=$class_name --trainer.callbacks.targets='["layer*"]'
```

```python
from lightning.pytorch import Trainer
from lit_methods import MLP, ImageClassifier
from lit_methods.callbacks import $class_name
from lit_methods.datamodules import DigitsDataModule

callback = $class_name(targets=$targets)
Trainer(max_epochs=1, callbacks=[callback]).fit(ImageClassifier(MLP([64, 64, 10])), datamodule=DigitsDataModule())
```""",
}

_TRAJECTORY = {
    "module": {
        "plain": "",
        "built": "$class_name(copy.deepcopy(network), learning_rate=0.01, weight=0.5)",
        "callbacks": "",
    },
    "callback": {
        "plain": "PlainClassifier, ",
        "built": "PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.Adam(parameters, lr=0.01))",
        "callbacks": ", [$class_name(weight=0.5)]",
    },
}


@dataclass(frozen=True)
class Place:
    """Where skeletons go.

    Attributes:
        root: Top folder of the checkout or project.
        package: Import name of somebody's package; "" in a checkout of this repository.
        folder: Folder of that package, relative to ``root``.
        project: Further files that make the package, by path relative to ``root``: template.
        entry_point: The project's metadata don't name the package yet.
    """

    root: Path
    package: str = ""
    folder: Path = Path()
    project: Mapping[Path, str] | None = None
    entry_point: bool = False

    @property
    def ours(self) -> bool:
        """It is a checkout of this repository."""
        return not self.package

    def stub(self, form: str) -> Path:
        """The list of public names that gets a line, relative to ``root``."""
        if not self.ours:
            return self.folder / "__init__.pyi"
        return Path({"module": "lit_methods", "datamodule": "datamodules"}.get(form, "callbacks")) / "__init__.pyi"

    def families(self) -> set[str]:
        """Folders of a checkout that hold techniques, hosts or data."""
        tops = [self.root / name for name in ("lit_methods", "lit_methods/tasks", "callbacks", "datamodules")]
        found = {init.parent.name for top in tops for init in top.glob("*/__init__.py")}
        return found - set(_INFRASTRUCTURE)


@dataclass(frozen=True)
class Skeleton:
    """What ``lit new`` writes.

    Attributes:
        place: Where.
        slug: Short lower-case name, a Python identifier.
        form: A key of ``FORMS``.
        class_name: Name of the class.
        family: Folder that holds it; in somebody's package only the word in the catalogue.
        title: Title of the paper, or what the data are.
    """

    place: Place
    slug: str
    form: str
    class_name: str
    family: str
    title: str

    @property
    def in_folder(self) -> bool:
        """Core and wiring are files of a folder of their own."""
        return self.form in ("callback", "module")

    @property
    def home(self) -> Path:
        """The technique's folder, or the folder of its file, relative to the root."""
        parent = self.place.folder if not self.place.ours else self.place.stub(self.form).parent / self.family
        return parent / self.slug if self.in_folder else parent

    @property
    def wiring(self) -> Path:
        """The file that holds the class."""
        return self.home / f"{self.form if self.in_folder else self.slug}.py"

    @property
    def core(self) -> Path:
        """The file that holds the maths."""
        return self.home / "core.py" if self.in_folder else self.wiring

    @property
    def tests(self) -> Path:
        """The file of tests."""
        if not self.place.ours:
            return Path("tests") / f"test_{self.slug}.py"
        if self.form == "datamodule":
            return Path("tests/datamodules") / f"test_{self.slug}.py"
        below = Path("tests") / ("" if self.form == "module" else "callbacks") / self.family
        return below / f"test_{self.slug}_technique.py"  # pytest wants every file name once

    @property
    def configs(self) -> Path:
        """Folder of the configs."""
        return Path("configs") if self.place.ours else self.place.folder / "configs"

    def _module(self, file: Path) -> str:
        """Import name of a source file."""
        parts = file.with_suffix("").parts
        if not self.place.ours:
            return ".".join([self.place.package, *parts[len(self.place.folder.parts) :]])
        return ".".join(parts if parts[0] == "lit_methods" else ("lit_methods", *parts))

    @property
    def public(self) -> str:
        """Dotted path of the class as its users write it."""
        stub = self.place.stub(self.form)
        if not self.place.ours and not (self.place.root / stub).is_file() and stub not in (self.place.project or {}):
            return f"{self._module(self.wiring)}.{self.class_name}"  # a package that lists its names in its own way
        return f"{self._module(stub.parent / 'x').rpartition('.')[0]}.{self.class_name}"

    def words(self) -> dict[str, str]:
        """Values of the placeholders."""
        on_weights = self.form == "callback"
        words = {
            "slug": self.slug,
            "class_name": self.class_name,
            "title": self.title,
            "family": self.family,
            "form": "module" if self.form == "module" else "callback",
            "public": self.public,
            "module": self._module(self.home),
            "core": self._module(self.core),
            "wiring": self._module(self.wiring),
            "argument": "weights" if on_weights else "features",
            "shape": "(out, in)" if on_weights else "(B, D)",
            "targets": '["network.*.weight"]' if on_weights else '["network"]',
            "what": "parameters" if on_weights else "submodules",
            "golden": '"loss",' if self.place.ours else "",
            "helpers": "helpers" if self.place.ours else "technique_helpers",
            "package": self.place.package,
            "distribution": self.place.package.replace("_", "-"),
        }
        words["tests_of_core"] = _template("test_core", words)
        words["attach"] = Template(_ATTACH[words["form"]]).substitute(words)
        return words

    def files(self) -> dict[Path, str]:
        """Path relative to the root -> text of every new file."""
        kind = "module" if self.form == "module" else "callback"
        targets = {self.wiring: f"{self.form}.py", self.tests: f"test_{'datamodule' if self.form == 'datamodule' else kind}.py"}
        if self.in_folder:
            targets[self.core] = "core.py"
        if self.form != "datamodule":
            targets[self.configs / f"{self.slug}.yaml"] = f"{kind}.yaml"
        if self.form != "datamodule" and self.place.ours:
            golden = Path("tests/golden")
            targets[golden / f"test_{self.slug}.py"] = "golden.py"
            targets[golden / "data" / self.slug / "make.py"] = "golden_script.py"
            targets[golden / "data" / self.slug / "README.md"] = "golden.md"
        words = self.words()
        project = dict(self.place.project or {})
        helpers = Path("tests") / f"{words['helpers']}.py"
        if not self.place.ours and not (self.place.root / helpers).exists():
            project[helpers] = "helpers.py"
        texts = {path: _template(name, words) if name else "" for path, name in {**targets, **project}.items()}
        if self.in_folder:
            texts[self.home / "__init__.py"] = f'"""{self.class_name}."""\n'
        if self.place.ours and not (self.place.root / self.wiring.parents[self.in_folder] / "__init__.py").exists():
            texts[self.wiring.parents[self.in_folder] / "__init__.py"] = f'"""The family {self.family}."""\n'
        first_party = ("lit_methods", "golden", words["helpers"], self.place.package or "lit_methods")
        return {path: _sorted_imports(text, first_party) if path.suffix == ".py" else text for path, text in texts.items()}

    def changes(self) -> dict[Path, str]:
        """Path relative to the root -> new text of every file that gets a line."""
        changed = {}
        stub = self.place.stub(self.form)
        if (self.place.root / stub).is_file():
            changed[stub] = self._with_name((self.place.root / stub).read_text(encoding="utf-8"))
        if self.place.entry_point:
            pyproject = (self.place.root / "pyproject.toml").read_text(encoding="utf-8")
            table = f'[project.entry-points."{GROUP}"]\n{self.place.package} = "{self.place.package}"\n'
            changed[Path("pyproject.toml")] = f"{pyproject.rstrip()}\n\n{table}"
        return changed

    def _with_name(self, text: str) -> str:
        """The list of public names with a line for the class, where an import sorter would put it."""
        stub = self.place.stub(self.form)
        module = self._module(self.wiring).removeprefix(f"{self._module(stub.parent / 'x').rpartition('.')[0]}.")
        lines = text.splitlines()
        names = [number for number, line in enumerate(lines) if re.match(r"from \.[\w.]+ import ", line)]
        before = [number for number in names if lines[number].split()[1].lower() <= f".{module}"]
        place = before[-1] + 1 if before else names[0] if names else len(lines)
        lines.insert(place, f"from .{module} import {self.class_name} as {self.class_name}")
        return "\n".join(lines) + "\n"

    def write(self) -> list[Path]:
        """Write the files and change those that get a line; all or nothing.

        Raises:
            CommandError: One of the files exists, a line would become too long, or the folder can't be written.
        """
        texts, changed = self.files(), self.changes()
        if not self.place.ours and (stub := self.place.stub(self.form)) in texts:
            texts[stub] = self._with_name("")
        write_all(self.place.root, texts, changed)
        return [*texts, *changed]


def write_all(root: Path, texts: Mapping[Path, str], changed: Mapping[Path, str]) -> None:
    """Write new files, and files anew that exist; all or nothing.

    Raises:
        CommandError: A new file exists, a line of Python would become too long, or the folder can't be written.
    """
    existing = [str(path) for path in texts if (root / path).exists()]
    if existing:
        raise CommandError(f"{', '.join(existing)} exist{'s' if len(existing) == 1 else ''}: choose another slug, or remove it first")
    for path, text in {**texts, **changed}.items():
        longest = max((line for line in text.splitlines()), key=len, default="")
        if path.suffix in (".py", ".pyi") and len(longest) > _LONGEST:
            line = f"a line of {path} would have {len(longest)} characters ({longest.strip()[:60]} ...)"
            raise CommandError(f"{line}: give a shorter slug, family, title or --class")
    before = {path: (root / path).read_text(encoding="utf-8") for path in changed}
    begun: list[Path] = []
    folders: list[Path] = []
    try:
        for path, text in {**texts, **changed}.items():
            for folder in reversed([folder for folder in (root / path).parents if not folder.exists()]):
                folder.mkdir()
                folders.append(folder)
            begun.append(path)
            (root / path).write_text(text, encoding="utf-8")
    except OSError as error:
        for path in begun:
            if path in before:
                (root / path).write_text(before[path], encoding="utf-8")
            elif (root / path).is_file():
                (root / path).unlink()
        for folder in reversed(folders):
            folder.rmdir()
        raise CommandError(f"can't write {error.filename}: {error.strerror}; nothing was written", exit_code=1) from error


def _template(name: str, words: Mapping[str, str]) -> str:
    text = (files("lit_methods.cli") / "templates" / f"{name}.template").read_text(encoding="utf-8")
    return Template(text).substitute(words)


def _sorted_imports(text: str, first_party: tuple[str, ...]) -> str:
    """Neighbouring ``from`` imports of first-party packages in the order of an import sorter, which depends on their names."""
    lines: list[str] = []
    modules: dict[str, list[str]] = {}

    def rank(name: str) -> tuple[int, str]:  # constants, classes, functions
        return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name

    def flush() -> None:
        lines.extend(f"from {module} import {', '.join(names)}" for module, names in sorted(modules.items()))
        modules.clear()

    for line in text.splitlines():
        found = re.match(r"from ((\w+)[\w.]*) import (.*)", line)
        if found and found[2] in first_party:
            modules[found[1]] = sorted([*modules.get(found[1], []), *found[3].split(", ")], key=rank)
        else:
            flush()
            lines.append(line)
    flush()
    return "\n".join(lines) + "\n"


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def new(argv: list[str]) -> int:
    """``lit new <slug> --form term|callback|module|datamodule``, and ``lit new <slug> --complete``."""
    forms = "; ".join(f"{form}: {what}" for form, what in FORMS.items())
    parser = Parser(
        prog="lit new",
        description="Write the skeleton of a technique or datamodule into the current checkout of lit-methods, into the current Python "
        "package, or, anywhere else, into a new package in a folder of its own.",
    )
    parser.add_argument("slug", help="short lower-case name, such as two_views")
    parser.add_argument("--form", metavar="|".join(FORMS), help=forms)
    parser.add_argument("--class", dest="class_name", help="name of the class, such as VICReg; default: TwoViews for two_views")
    parser.add_argument("--family", help="folder that holds it, such as lidar; needed in a checkout")
    parser.add_argument("--new-family", action="store_true", help="--family is a new one")
    parser.add_argument("--title", help="title of the paper")
    parser.add_argument("--package", help="outside a checkout: name of the new package; default: lit_<slug>")
    parser.add_argument(
        "--complete", action="store_true", help="write what a draft lacks: claim, docs page with its loop, full-scale config"
    )
    options = parsed(parser, argv)
    if options is None:
        return 0
    for name, value in (("slug", options.slug), ("--family", options.family), ("--package", options.package)):
        if value is not None and (not re.fullmatch(r"[a-z][a-z0-9_]*", value) or keyword.iskeyword(value)):
            raise CommandError(f"{name} {value!r} must be lower-case letters, digits and _, starting with a letter, such as two_views")
    if options.complete:
        return _complete(options.slug)
    if options.form not in FORMS:
        given = "which form?" if options.form is None else f"there is no form {options.form!r}:"
        raise CommandError(f"lit new {options.slug}: {given} --form {' | '.join(FORMS)}\n  {forms}")
    skeleton = _skeleton(options)
    _refuse_taken(skeleton)
    written = skeleton.write()
    print("\n".join(f"  {path.as_posix()}" for path in written))
    print("\n" + _next_steps(skeleton))
    return 0


def _skeleton(options: argparse.Namespace) -> Skeleton:
    class_name = options.class_name or "".join(part.capitalize() for part in options.slug.split("_"))
    if options.form == "datamodule" and options.class_name is None:
        class_name += "DataModule"
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", class_name):
        raise CommandError(f"--class {class_name!r} must be letters and digits, starting with a capital, such as VICReg")
    title = options.title or options.slug.replace("_", " ").capitalize()
    if any(mark in title for mark in '"\\\n$'):
        raise CommandError("--title must not hold quotes, dollar signs, backslashes or line breaks")
    checkout = find_checkout()
    if checkout is None:
        place = _package(options.package, options.slug)
        return Skeleton(place, options.slug, options.form, class_name, options.family or "general", title)
    if options.package is not None:
        raise CommandError(f"--package is for other folders: {checkout} is a checkout of lit-methods")
    place = Place(checkout)
    known = place.families()
    if options.family is None:
        raise CommandError(f"give --family: {', '.join(sorted(known))}; or a new one with --new-family")
    if options.family not in known and not options.new_family:
        near = suggest(options.family, known, otherwise=f"known: {', '.join(sorted(known))}")
        raise CommandError(f"no family {options.family!r}: for a new one add --new-family{near}")
    return Skeleton(place, options.slug, options.form, class_name, options.family, title)


def find_checkout() -> Path | None:
    """Top folder of the checkout of this repository that the current folder is in; None outside."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "lit_methods" / "catalog.py").is_file() and (folder / "callbacks" / "__init__.pyi").is_file():
            return folder
    return None


def _package(name: str | None, slug: str) -> Place:
    """The package of the current folder's project, or a new one.

    Raises:
        CommandError: There is a project without a package, or ``name`` is given although there is a project.
    """
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file()), None)
    if root is None:
        package = name or f"lit_{slug}"
        if (here / package).exists():
            raise CommandError(f"{here / package} exists: cd into it, or give another --package")
        if importlib.util.find_spec(package) is not None:
            raise CommandError(f"--package {package} is the name of an installed package: give another one")
        inside = Path(package)
        project = {
            Path("pyproject.toml"): "pyproject.toml",
            inside / "__init__.py": "init.py",
            inside / "__init__.pyi": "",
        }
        return Place(here / package, package, inside, project)
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    named = re.search(rf"^\[project\.entry-points\.[\"']{re.escape(GROUP)}[\"']\]\s*\n\s*[\w\"'.-]+\s*=\s*[\"']([\w.]+)", text, flags=re.M)
    project_name = re.search(r"^\[project\][^\[]*?^name\s*=\s*[\"']([\w.-]+)", text, flags=re.M)
    package = named[1] if named else re.sub(r"[.-]", "_", project_name[1]).lower() if project_name else ""
    if name is not None and name != package:
        raise CommandError(
            f"--package {name}: {root} is a project already, of the package {package or '?'}: leave --package out, or cd out"
        )
    inside = Path(*package.split("."))
    folder = next((folder for folder in (inside, "src" / inside) if package and (root / folder / "__init__.py").is_file()), None)
    if folder is None:
        raise CommandError(
            f"{root / 'pyproject.toml'} has no package that lit new could add to: expected [project] with a name, and the folder "
            f"{package or '<name>'}/ or src/{package or '<name>'}/ with __init__.py"
        )
    return Place(root, package, folder, entry_point=named is None)


def _refuse_taken(skeleton: Skeleton) -> None:
    """Raise if the class or the slug is there already."""
    place = skeleton.place
    names = dict(installed_names())
    if place.ours:
        for form in ("term", "module", "datamodule"):
            if (place.root / place.stub(form)).is_file():
                names.update(stub_names(place.stub(form).parent.as_posix(), place.root / place.stub(form)))
    if skeleton.class_name in names:
        where = names[skeleton.class_name]
        raise CommandError(f"a class {skeleton.class_name} is already listed in {where}: choose another slug, or give --class")
    if skeleton.slug in installed_techniques():
        raise CommandError(f"there is a technique {skeleton.slug!r} already: choose another slug (lit info {skeleton.slug})")


def _next_steps(skeleton: Skeleton) -> str:
    slug, place = skeleton.slug, skeleton.place
    tests = skeleton.tests.as_posix()
    if skeleton.form == "datamodule":
        steps = [
            f"{skeleton.wiring.as_posix()}: read_split and the docstrings; it works on the built-in digits as it is",
            f"pytest {tests}",
        ]
    else:
        entry = "" if skeleton.core == skeleton.wiring else f"{skeleton.wiring.as_posix()}: "
        steps = [
            f"{skeleton.core.as_posix()}: write {slug}_loss; {entry}fill in the catalogue entry",
            f"pytest {tests}",
        ]
        if place.ours:
            folder = f"tests/golden/data/{slug}"
            steps.insert(0, f"{folder}/make.py: call the authors' code, run it, say in README.md where it comes from")
            steps[-1] = f"pytest {tests} tests/golden/test_{slug}.py"
        steps.append(f"lit fit --config configs/{slug}.yaml")
        if place.ours:
            steps.append(f"when it is done: lit new {slug} --complete, for the claim, the page and the full-scale config")
    if not place.ours:
        cd = "" if place.root == Path.cwd() else f"cd {place.root.name} && "
        steps.insert(0, f"{cd}pip install -e .  (makes `lit list`, short names and configs find it)")
    return "\n".join(["next", *(f"  {number}. {step}" for number, step in enumerate(steps, start=1))])


def _complete(slug: str) -> int:
    """``lit new <slug> --complete``: what a draft lacks to be published."""
    root = find_checkout()
    if root is None:
        raise CommandError("--complete writes into a checkout of lit-methods, and the current folder is in none")
    known: dict[str, Technique] = collect(root / ("lit_methods" if name == PACKAGES[0] else name.rpartition(".")[2]) for name in PACKAGES)
    if slug not in known:
        drafts = [entry.slug for entry in known.values() if entry.draft]
        raise CommandError(f"no technique {slug!r} to complete" + suggest(slug, drafts, otherwise="lit new <slug> --form ... begins one"))
    entry = known[slug]
    if not entry.draft:
        raise CommandError(f"{slug} is no draft: it has a claim, a page and a full-scale config")
    form = "module" if entry.form == "module" else "callback"
    words = {"slug": slug, "class_name": entry.names[0], "title": entry.title, "family": entry.family, "form": form}
    words["targets"] = '["network"]'
    words["metric"] = f"{slug}/val_loss" if form == "module" else "classifier/val_loss"
    words["attach"] = Template(_ATTACH[form]).substitute(words)
    home = "lit_methods" if form == "module" else "callbacks"
    words["package"] = "lit_methods" if form == "module" else "lit_methods.callbacks"
    in_folder = (root / home / entry.family / slug).is_dir()
    words["core"] = f"{words['package']}.{entry.family}.{slug}" + (".core" if in_folder else "")
    of_weights = form == "callback" and in_folder
    words["term"] = f"sum({slug}_loss(value) for value in network.parameters() if value.ndim > 1)" if of_weights else f"{slug}_loss(logits)"
    words |= {name: Template(text).substitute(words) for name, text in _TRAJECTORY[form].items()}
    targets = {
        Path("configs/full") / f"{slug}.yaml": "full.yaml",
        Path("configs/claims") / f"{slug}.yaml": "claim.yaml",
        Path("docs/techniques") / f"{slug}.md": "docs.md",
        Path("tests/trajectory") / f"test_{slug}.py": "trajectory.py",
    }
    texts = {path: _template(name, words) for path, name in targets.items()}
    write_all(root, texts, {})
    print("\n".join(f"  {path.as_posix()}" for path in texts))
    print(f"""
next
  1. fill them in, and arxiv, claim and summary of the catalogue entry; pytest tests/trajectory/test_{slug}.py
  2. lit claims {slug} --plan, --quick, then without either
  3. take draft=True out of the catalogue entry
  4. python docs/make_gallery.py {slug}; show the picture on the page
  5. python tests/test_docs.py (README), a line in CHANGELOG.md""")
    return 0
