"""``lit list | info | cp | export``. Only ``export`` imports torch."""

import argparse
import ast
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_methods.catalog import Technique, package_folder, techniques
from lit_methods.cli.config_files import copy_config
from lit_methods.errors import CommandError, suggest
from lit_methods.files import replacing

DOCS = "https://github.com/lit-methods/lit-methods/blob/main/docs/techniques"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are our short messages."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise CommandError(f"{self.prog}: {message}\n  {self.format_usage().strip()}")


def list_techniques(argv: list[str]) -> int:
    """``lit list``: a table of the techniques, or JSON with every field."""
    parser = Parser(prog="lit list", description="Techniques that are here.")
    parser.add_argument("--family", help="only this family, such as lidar")
    parser.add_argument("--json", action="store_true", help="every field, as a JSON list")
    options = parsed(parser, argv)
    if options is None:
        return 0
    chosen = list(techniques().values())
    if options.family is not None:
        families = {technique.family for technique in chosen}
        if options.family not in families:
            raise CommandError(f"no technique of family {options.family!r}" + suggest(options.family, families))
        chosen = [technique for technique in chosen if technique.family == options.family]
    if options.json:
        print(json.dumps([dataclasses.asdict(technique) for technique in chosen], indent=2, ensure_ascii=False))
        return 0
    rows = [("slug", "family", "form", "title", "arXiv"), *((t.slug, t.family, t.form, t.title, t.arxiv or "-") for t in chosen)]
    print(_table(rows))
    print(f"\n{len(chosen)} technique{'' if len(chosen) == 1 else 's'}; lit info <slug> for one of them")
    return 0


def _table(rows: Sequence[Sequence[str]], title_width: int = 72) -> str:
    cut = [[cell if len(cell) <= title_width else f"{cell[: title_width - 3]}..." for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cut) for column in range(len(cut[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cut)


def info(argv: list[str]) -> int:
    """``lit info <technique>``: all fields, its dashboard panels and how to run it."""
    parser = Parser(prog="lit info", description="What a technique does, its configs, how to run it.")
    parser.add_argument("technique", help="slug, as `lit list` shows it")
    parser.add_argument("--json", action="store_true", help="the catalogue entry as JSON")
    options = parsed(parser, argv)
    if options is None:
        return 0
    known = techniques()
    if options.technique not in known:
        raise CommandError(f"no technique {options.technique!r}" + suggest(options.technique, known, otherwise="see: lit list"))
    technique = known[options.technique]
    if options.json:
        print(json.dumps(dataclasses.asdict(technique), indent=2, ensure_ascii=False))
        return 0
    print(_described(technique))
    return 0


def _described(technique: Technique) -> str:
    rows = [
        ("paper", f"https://arxiv.org/abs/{technique.arxiv}" if technique.arxiv else "-"),
        ("family", technique.family),
        ("form", {"module": "LightningModule", "callback": "callback for any LightningModule"}.get(technique.form, technique.form)),
        ("classes", "\n".join(technique.classes)),
        ("configs", "\n".join(f"configs/{config}" for config in technique.configs) or "-"),
        ("golden", ", ".join(technique.golden) or "-"),
        ("claim", technique.claim or "-"),
        ("panels", "\n".join(_panel_titles(technique)) or "-"),
        ("docs", f"{DOCS}/{technique.slug}.md"),
    ]
    short = technique.classes[0].rpartition(".")[2] if technique.classes else ""
    if technique.configs:
        first = f"configs/{technique.configs[0]}"
        rows.append(("run", f"lit fit --config {first}\nlit cp {first} my_{technique.slug}.yaml"))
    if technique.form == "callback" and short:
        rows.append(("attach", f"lit fit --config yours.yaml --trainer.callbacks+={short}"))
    if short:
        section = "trainer.callbacks" if technique.form == "callback" else "model"
        rows.append(("arguments", f"lit fit --{section}.help {short}"))
    lines = [f"{technique.slug}: {technique.title}", "", technique.summary, ""]
    for label, text in rows:
        first, *others = text.split("\n")
        lines += [f"{label:10} {first}", *(f"{'':10} {other}" for other in others)]
    return "\n".join(lines)


def _panel_titles(technique: Technique) -> list[str]:
    """Titles of the panels that the technique's classes declare, read from the source without importing it."""
    wanted = {path.rpartition(".")[2] for path in technique.classes}
    titles: list[str] = []
    for package in ("lit_methods", "lit_methods.callbacks"):
        for source in sorted(package_folder(package).rglob("*.py")):
            text = source.read_text(encoding="utf-8")
            if "panels" not in text or not any(f"class {name}" in text for name in wanted):
                continue
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name in wanted:
                    titles += [title for statement in node.body for title in _titles(statement)]
    return list(dict.fromkeys(titles))  # installed, the callbacks lie inside lit_methods and are met twice


def _titles(statement: ast.stmt) -> list[str]:
    if not isinstance(statement, ast.AnnAssign | ast.Assign):
        return []
    target, value = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0], statement.value
    if not (isinstance(target, ast.Name) and target.id == "panels" and isinstance(value, ast.Tuple | ast.List)):
        return []
    titles = []
    for call in value.elts:
        if isinstance(call, ast.Call):
            title: Any = next((word.value for word in call.keywords if word.arg == "title"), call.args[0] if call.args else None)
            if isinstance(title, ast.Constant):
                titles.append(str(title.value))
    return titles


def copy(argv: list[str]) -> int:
    """``lit cp <config> <dest>``: copy a config to edit."""
    parser = Parser(prog="lit cp", description="Copy a config, shipped or your own, to edit it.")
    parser.add_argument("config", help="such as configs/superflow.yaml")
    parser.add_argument("dest", help="a file or an existing folder")
    parser.add_argument("--force", action="store_true", help="overwrite dest")
    options = parsed(parser, argv)
    if options is None:
        return 0
    target = copy_config(options.config, options.dest, options.force)
    print(f"{target}\n  lit fit --config {target}")
    return 0


def export(argv: list[str]) -> int:
    """``lit export <ckpt> <out>``: the plain state dict of a checkpoint's LightningModule."""
    parser = Parser(prog="lit export", description="Write the plain state dict out of a checkpoint.")
    parser.add_argument("ckpt", help="a Lightning checkpoint, such as runs/<name>/<time>/checkpoints/last.ckpt")
    parser.add_argument("out", help="a new file ending in .pt or .safetensors")
    parser.add_argument("--prefix", default="", help="keep only the entries that start so, and strip it (such as backbone_3d.)")
    parser.add_argument("--force", action="store_true", help="overwrite out")
    options = parsed(parser, argv)
    if options is None:
        return 0
    out = Path(options.out).expanduser()
    if out.suffix not in (".pt", ".pth", ".safetensors"):
        raise CommandError(f"{options.out} must end in .pt or .safetensors")
    if out.exists() and not options.force:
        raise CommandError(f"{out} exists: choose another name, or overwrite it with --force")
    from lit_methods.runs.checkpoints import PrefixError, read_state_dict

    try:
        weights = read_state_dict(Path(options.ckpt).expanduser(), options.prefix, plain=False)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=2 if isinstance(error, OSError | PrefixError) else 1) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:  # a full disk must not leave half a file under the final name
        if out.suffix == ".safetensors":
            try:
                from safetensors.torch import save_file
            except ImportError as error:
                raise CommandError("writing .safetensors needs `pip install safetensors`; .pt needs nothing", exit_code=1) from error
            save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, partial)
        else:
            import torch

            torch.save(weights, partial)
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{out}: {len(weights)} tensors, {count:,} values")
    return 0


def parsed(parser: Parser, argv: list[str]) -> argparse.Namespace | None:
    """The options; None after ``--help``."""
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        return None
    return parser.parse_args(argv)
