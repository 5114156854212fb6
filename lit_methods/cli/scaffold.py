"""``lit new``: the skeleton of a technique, written into a checkout of the repository."""

import keyword
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError

_ATTACH = {
    "module": """In Python:

```python
from lightning.pytorch import Trainer
from lit_methods import $class_name

Trainer(max_epochs=1).fit($class_name(), datamodule=my_data)
```""",
    "callback": """On your own module, without touching it:

```bash
lit fit --model my_project.MyModule --trainer.callbacks+=$class_name --trainer.callbacks.targets='["backbone.*.weight"]'
```

```python
from lightning.pytorch import Trainer
from lit_methods.callbacks import $class_name

Trainer(max_epochs=1, callbacks=[$class_name(targets=["backbone.*.weight"])]).fit(my_module, datamodule=my_data)
```""",
}


@dataclass(frozen=True)
class Skeleton:
    """What ``lit new`` writes.

    Attributes:
        root: Top folder of the checkout.
        slug: Short lower-case name, a Python identifier.
        form: ``module`` or ``callback``.
        family: Folder that holds it.
        title: Title of the paper.
    """

    root: Path
    slug: str
    form: str
    family: str
    title: str

    @property
    def class_name(self) -> str:
        """``two_views`` -> ``TwoViews``."""
        return "".join(part.capitalize() for part in self.slug.split("_"))

    @property
    def stub(self) -> Path:
        """The list of public names that gets a line."""
        return self.root / ("lit_methods" if self.form == "module" else "callbacks") / "__init__.pyi"

    def files(self) -> dict[Path, str]:
        """Path -> text of every new file."""
        package = "lit_methods" if self.form == "module" else "lit_methods.callbacks"
        tests = Path("tests") / self.family if self.form == "module" else Path("tests") / "callbacks" / self.family
        words = {
            "slug": self.slug,
            "class_name": self.class_name,
            "title": self.title,
            "family": self.family,
            "form": self.form,
            "module": f"{package}.{self.family}.{self.slug}",
            "depth": str(len(tests.parts)),
        }
        words["attach"] = Template(_ATTACH[self.form]).substitute(words)
        folder = self.stub.parent.relative_to(self.root) / self.family
        targets = {
            folder / f"{self.slug}.py": f"{self.form}.py",
            Path("configs") / f"{self.slug}.yaml": f"{self.form}.yaml",
            Path("configs") / "claims" / f"{self.slug}.yaml": "claim.yaml",
            Path("tests") / "golden" / f"test_{self.slug}.py": "golden.py",
            tests / f"test_{self.slug}_technique.py": "test.py",  # pytest wants every file name once
            Path("docs") / "techniques" / f"{self.slug}.md": "docs.md",
        }
        templates = files("lit_methods.cli") / "templates"
        texts = {
            self.root / path: Template((templates / f"{name}.template").read_text(encoding="utf-8")).substitute(words)
            for path, name in targets.items()
        }
        package_file = self.root / folder / "__init__.py"
        if not package_file.exists():
            texts[package_file] = f'"""Techniques of the family {self.family}."""\n'
        return texts

    def write(self) -> list[Path]:
        """Write the files and the line in the list of public names; all or nothing.

        Raises:
            CommandError: One of the files exists.
        """
        texts = self.files()
        existing = [str(path.relative_to(self.root)) for path in texts if path.exists()]
        if existing:
            raise CommandError(f"{', '.join(existing)} exist{'s' if len(existing) == 1 else ''}: choose another slug, or remove it first")
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        lines = self.stub.read_text(encoding="utf-8").splitlines()
        imports = [number for number, line in enumerate(lines) if line.startswith("from .")]
        lines.insert(imports[-1] + 1 if imports else 0, f"from .{self.family}.{self.slug} import {self.class_name} as {self.class_name}")
        self.stub.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [*texts, self.stub]


def new(argv: list[str]) -> int:
    """``lit new <slug> --form callback|module``."""
    parser = Parser(prog="lit new", description="Write the skeleton of a technique into the current checkout.")
    parser.add_argument("slug", help="short lower-case name, such as two_views")
    parser.add_argument("--form", choices=("callback", "module"), required=True, help="attaches to any module, or owns the training step")
    parser.add_argument("--family", default="general", help="folder that holds it, such as lidar")
    parser.add_argument("--title", default=None, help="title of the paper")
    options = parsed(parser, argv)
    if options is None:
        return 0
    for name, value in (("slug", options.slug), ("--family", options.family)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", value) or keyword.iskeyword(value):
            raise CommandError(f"{name} {value!r} must be lower-case letters, digits and _, starting with a letter, such as two_views")
    root = _checkout()
    title = options.title or options.slug.replace("_", " ").capitalize()
    if any(mark in title for mark in '"\\\n'):
        raise CommandError("--title must not hold quotes, backslashes or line breaks")
    skeleton = Skeleton(root, options.slug, options.form, options.family, title)
    for stub in (root / "lit_methods" / "__init__.pyi", root / "callbacks" / "__init__.pyi", root / "datamodules" / "__init__.pyi"):
        if stub.is_file() and re.search(rf"\b{skeleton.class_name}\b", stub.read_text(encoding="utf-8")):
            raise CommandError(f"a class {skeleton.class_name} is already listed in {stub.relative_to(root)}: choose another slug")
    written = skeleton.write()
    print("\n".join(f"  {path.relative_to(root)}" for path in written))
    core = next(path for path in written if path.name == f"{options.slug}.py")
    print(
        f"""
next
  1. {core.relative_to(root)}: write {options.slug}_loss, fill in the catalogue entry
  2. put golden vectors from the authors' code into tests/golden/data/{options.slug}/ (loss-0.npz, ... and a README.md)
  3. pytest tests/golden/test_{options.slug}.py {next(p for p in written if p.name.endswith("_technique.py")).relative_to(root)}
  4. lit fit --config configs/{options.slug}.yaml, then the claim and the docs page"""
    )
    return 0


def _checkout() -> Path:
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "lit_methods" / "catalog.py").is_file() and (folder / "callbacks" / "__init__.pyi").is_file():
            return folder
    raise CommandError("lit new writes into a checkout of lit-methods, and the current folder is in none\n  git clone it and cd there")
