"""``lit list | info | cp | export``. Only ``export`` imports torch."""

import argparse
import ast
import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_methods.catalog import PACKAGES, Technique, installed_techniques, package_folder, plugins, published
from lit_methods.claims.records import verdict_words
from lit_methods.cli.config_files import config_heads, copy_config, shipped_configs
from lit_methods.errors import CommandError, suggest
from lit_methods.files import replacing

if TYPE_CHECKING:
    from lit_methods.parts import Part

DOCS = "https://github.com/lit-methods/lit-methods/blob/main/docs/techniques"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are our short messages."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise CommandError(f"{self.prog}: {message}\n  {self.format_usage().strip()}")


def list_techniques(argv: list[str]) -> int:
    """``lit list``: a table of the techniques, of the parts to build with, or of the configs; or JSON with every field."""
    parser = Parser(prog="lit list", description="Techniques that are here; with --parts what one builds with, with --configs what runs.")
    parser.add_argument("--parts", action="store_true", help="datamodules, host modules, networks, metrics, callbacks, base classes")
    parser.add_argument("--configs", action="store_true", help="every config, with the first line of its head")
    parser.add_argument("--family", help="only this family, such as lidar")
    parser.add_argument("--json", action="store_true", help="every field, as a JSON list")
    options = parsed(parser, argv)
    if options is None:
        return 0
    if options.parts and options.configs:
        raise CommandError("give --parts or --configs, not both")
    _warn_of_plugins()
    if options.configs:
        _list_configs(options.family, options.json)
    elif options.parts:
        _list_parts(options.family, options.json)
    else:
        _list_techniques(options.family, options.json)
    return 0


def _warn_of_plugins() -> None:
    for plugin in plugins():
        if plugin.problem:
            print(plugin.warning, file=sys.stderr)


def _list_techniques(family: str | None, as_json: bool) -> None:
    chosen = list(installed_techniques().values())
    if family is not None:
        families = {technique.family for technique in chosen}
        if family not in families:
            raise CommandError(f"no technique of family {family!r}" + suggest(family, families))
        chosen = [technique for technique in chosen if technique.family == family]
    if as_json:
        print(json.dumps([dataclasses.asdict(technique) for technique in chosen], indent=2, ensure_ascii=False))
        return
    rows = [("slug", "family", "form", "class", "title", "arXiv")]
    for entry in chosen:
        title = f"draft: {entry.title}" if entry.draft else entry.title
        rows.append((entry.slug, entry.family, entry.form, entry.names[0] if entry.names else "-", title, entry.arxiv or "-"))
    print(_table(rows, title_width=60))
    drafts = sum(entry.draft for entry in chosen)
    said = f" ({drafts} draft{'' if drafts == 1 else 's'})" if drafts else ""
    print(f"\n{len(chosen)} technique{'' if len(chosen) == 1 else 's'}{said}; lit info <slug or family>; lit list --parts, --configs")


def _list_parts(family: str | None, as_json: bool) -> None:
    from lit_methods.parts import KINDS, parts

    chosen = [part for part in parts() if family in (None, part.family)]
    if not chosen:
        raise CommandError(f"no part of family {family!r}" + suggest(str(family), {part.family for part in parts() if part.family}))
    if as_json:
        print(json.dumps([dataclasses.asdict(part) for part in chosen], indent=2, ensure_ascii=False))
        return
    for kind, heading in KINDS.items():
        if alike := [part for part in chosen if part.kind == kind]:
            print(f"{heading}\n{_parts_table(alike)}\n")
    print(f"{len(chosen)} parts; lit info <name> shows the whole docstring of one")


def _parts_table(alike: Sequence["Part"]) -> str:
    lines = []
    width = max(len(part.name) for part in alike)
    for part in alike:
        indent = " " * (width + 4)
        label = {"datamodule": "batch", "network": "shapes", "loss": "shapes"}.get(part.kind, "needs")
        text = [part.line, *([f"{label}: {part.shapes}"] if part.shapes else []), *([f"cost: {part.cost}"] if part.cost else [])]
        first, *others = [line for item in text for line in textwrap.wrap(item, 138 - len(indent), subsequent_indent="  ")]
        lines += [f"  {part.name:{width}}  {first}", *(f"{indent}{line}" for line in others)]
    return "\n".join(lines)


def _list_configs(family: str | None, as_json: bool) -> None:
    heads = config_heads()
    if family is not None:
        wanted = {config for entry in installed_techniques().values() if entry.family == family for config in _configs_of(entry, heads)}
        if not wanted:
            raise CommandError(f"no config of family {family!r}" + suggest(family, {t.family for t in installed_techniques().values()}))
        heads = {path: head for path, head in heads.items() if path in wanted}
    if as_json:
        print(json.dumps([{"path": path, "head": head} for path, head in heads.items()], indent=2, ensure_ascii=False))
        return
    print(_table([("config", "what it is"), *heads.items()], title_width=96))
    print(f"\n{len(heads)} configs; lit fit --config <config>; lit cp <config> <dest> copies one to edit")


def _configs_of(technique: Technique, heads: Iterable[str]) -> list[str]:
    """The technique's configs as a user writes them: those of the entry, and what ``full/`` and ``claims/`` hold under its slug."""
    named = [f"configs/{config}" for config in technique.configs]
    whole = re.compile(rf"configs/full/{technique.slug}(_\w+)?\.yaml|configs/claims/{technique.slug}\.yaml")
    return [*named, *(path for path in heads if path not in named and whole.fullmatch(path))]


def _table(rows: Sequence[Sequence[str]], title_width: int = 72) -> str:
    cut = [[cell if len(cell) <= title_width else f"{cell[: title_width - 3]}..." for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cut) for column in range(len(cut[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cut)


def info(argv: list[str]) -> int:
    """``lit info <technique, family or class>``: all fields, panels and how to run it; what a family holds; a part's docstring."""
    parser = Parser(prog="lit info", description="What a technique does, its configs, how to run it; what a family holds; what a class is.")
    parser.add_argument("name", metavar="technique", help="slug or family, as `lit list` shows them, or a class of `lit list --parts`")
    parser.add_argument("--json", action="store_true", help="the catalogue entry, or the list of entries, as JSON")
    options = parsed(parser, argv)
    if options is None:
        return 0
    _warn_of_plugins()
    known, name = installed_techniques(), options.name
    families = {technique.family for technique in known.values()}
    from lit_methods.parts import parts

    slugs = [entry.slug for entry in known.values() if name in (entry.slug, entry.names[0] if entry.names else "")]
    slugs = slugs or [entry.slug for entry in known.values() if name.lower() == entry.name.lower()]  # as people call it: iCT
    chosen: Any
    if slugs:
        chosen, text = known[slugs[0]], _described(known[slugs[0]])
    elif name in families | {part.family for part in parts() if part.family}:
        chosen = [technique for technique in known.values() if technique.family == name]
        text = _family(name, chosen)
    elif found := [part for part in parts() if part.name == name]:
        chosen, text = found[0], f"{found[0].path}: {found[0].kind}\n\n{found[0].docstring}"
    else:
        near = suggest(name, {*known, *families, *(part.name for part in parts())}, otherwise="see: lit list, lit list --parts")
        raise CommandError(f"no technique, family or part {name!r}" + near)
    if options.json:
        fields = [dataclasses.asdict(one) for one in chosen] if isinstance(chosen, list) else dataclasses.asdict(chosen)
        text = json.dumps(fields, indent=2, ensure_ascii=False)
    print(text)
    return 0


def _family(name: str, entries: Sequence[Technique]) -> str:
    from lit_methods.parts import KINDS, parts

    lines = [f"{name}: {len(entries)} technique{'' if len(entries) == 1 else 's'}", ""]
    heads = config_heads()
    for entry in entries:
        lines += [f"{entry.slug} ({', '.join(entry.names)}){', draft' if entry.draft else ''}: {entry.title}", f"  {entry.summary or '-'}"]
        lines += [f"  {config}" for config in _configs_of(entry, heads)] + [""]
    for kind, heading in KINDS.items():
        if alike := [part for part in parts() if part.family == name and part.kind == kind]:
            lines += [heading, _parts_table(alike), ""]
    return "\n".join(lines).rstrip()


def _described(technique: Technique) -> str:
    rows = [
        ("paper", f"https://arxiv.org/abs/{technique.arxiv}" if technique.arxiv else "-"),
        ("family", technique.family),
        ("form", {"module": "LightningModule", "callback": "callback for any LightningModule"}.get(technique.form, technique.form)),
        ("classes", "\n".join(technique.classes)),
        ("configs", "\n".join(_configs_of(technique, shipped_configs())) or "-"),
        ("golden", ", ".join(technique.golden) or "-"),
        ("claim", technique.claim or "-"),
        *([("verdict", verdict_words(technique.slug))] if technique.claim and technique.slug in published() else []),
        ("panels", "\n".join(_panel_titles(technique)) or "-"),
    ]
    if technique.slug in published():
        rows.append(("docs", f"{DOCS}/{technique.slug}.md"))
    if technique.draft:
        rows.insert(0, ("draft", "not finished: no full-scale config, claim and page yet"))
    short = technique.classes[0].rpartition(".")[2] if technique.classes else ""
    if technique.configs:
        first = f"configs/{technique.configs[0]}"
        rows.append(("run", f"lit fit --config {first}\nlit cp {first} my_{technique.slug}.yaml"))
    if technique.form == "callback" and short:
        rows.append(("attach", f"lit fit --config yours.yaml --trainer.callbacks+={short}"))
    if short:
        section = "trainer.callbacks" if technique.form == "callback" else "model"
        rows.append(("arguments", f"lit fit --{section}.help {short}"))
    lines = [f"{technique.slug}: {technique.title}", "", *([technique.summary, ""] if technique.summary else [])]
    for label, text in rows:
        first, *others = text.split("\n")
        lines += [f"{label:10} {first}", *(f"{'':10} {other}" for other in others)]
    return "\n".join(lines)


def _panel_titles(technique: Technique) -> list[str]:
    """Titles of the panels that the technique's classes declare, read from the source without importing it."""
    wanted = {path.rpartition(".")[2] for path in technique.classes}
    titles: list[str] = []
    folders = [*map(package_folder, PACKAGES), *(plugin.folder for plugin in plugins() if plugin.folder is not None)]
    for folder in folders:
        for source in sorted(folder.rglob("*.py")):
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
    """``lit export <ckpt> <out>``: the plain state dict of a checkpoint's LightningModule, or a sparse autoencoder for sae-lens."""
    parser = Parser(prog="lit export", description="Write the plain state dict out of a checkpoint.")
    parser.add_argument("ckpt", help="a Lightning checkpoint, such as runs/<name>/<time>/checkpoints/last.ckpt")
    parser.add_argument("out", help="a new file ending in .pt or .safetensors; with the other formats a new folder")
    parser.add_argument(
        "--format",
        default="weights",
        help="weights; folder: safetensors, config and a model card, as `lit push` takes it; sae-lens: a SparseAutoencoder for its "
        "SAE.load_from_disk; onnx, torch-export: the network as one graph for any batch, compared with the module",
    )
    parser.add_argument("--part", default="", help="onnx, torch-export: a submodule, such as network; default: the module's forward")
    parser.add_argument("--shape", nargs="+", type=int, help="onnx, torch-export: of an input without the batch; default: the run's data")
    parser.add_argument("--tokens", type=int, help="with --shape: inputs are whole numbers below this, not float32")
    parser.add_argument("--prefix", default="", help="keep only the entries that start so, and strip it (such as backbone_3d.)")
    parser.add_argument("--force", action="store_true", help="overwrite out")
    options = parsed(parser, argv)
    if options is None:
        return 0
    out = Path(options.out).expanduser()
    if options.format not in ("weights", "folder", "sae-lens", "onnx", "torch-export"):
        raise CommandError(f"--format is {options.format!r}: give weights, folder, sae-lens, onnx or torch-export")
    if options.format == "sae-lens":
        return _export_saelens(Path(options.ckpt).expanduser(), out)
    if options.format in ("onnx", "torch-export"):
        return _export_network(options, out)
    if options.part or options.shape or options.tokens:
        raise CommandError("--part, --shape and --tokens are of --format onnx and torch-export; parts of the weights: --prefix")
    is_folder = options.format == "folder"
    if not is_folder and out.suffix not in (".pt", ".pth", ".safetensors"):
        raise CommandError(f"{options.out} must end in .pt or .safetensors, or be a folder, with --format folder")
    if not is_folder and out.exists() and not options.force:
        raise CommandError(f"{out} exists: choose another name, or overwrite it with --force")
    from lit_methods.runs.checkpoints import PrefixError, read_state_dict

    try:
        weights = read_state_dict(Path(options.ckpt).expanduser(), options.prefix, plain=False)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=2 if isinstance(error, OSError | PrefixError) else 1) from error
    from lit_methods.cli.share import export_folder, metadata, origin

    checkpoint = Path(options.ckpt).expanduser()
    if is_folder:
        export_folder(checkpoint, out, weights)
        print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}\n  lit push {out} <user/name>")
    else:
        save_weights(out, weights, metadata(origin(checkpoint)))
    return 0


def save_weights(out: Path, weights: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors into a file ending in .pt or .safetensors, which also holds the metadata, and say so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:  # a full disk must not leave half a file under the final name
        if out.suffix == ".safetensors":
            try:
                from safetensors.torch import save_file
            except ImportError as error:
                raise CommandError("writing .safetensors needs `pip install safetensors`; .pt needs nothing", exit_code=1) from error
            save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, partial, metadata)
        else:
            import torch

            torch.save(weights, partial)
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{out}: {len(weights)} tensors, {count:,} values")


def _export_network(options: argparse.Namespace, out: Path) -> int:
    from lit_methods.cli.network import SUFFIX, export_network

    if out.suffix != SUFFIX[options.format]:
        raise CommandError(f"{options.out} must end in {SUFFIX[options.format]} with --format {options.format}")
    if out.exists() and not options.force:
        raise CommandError(f"{out} exists: choose another name, or overwrite it with --force")
    if options.tokens is not None and (options.tokens < 1 or options.shape is None):
        raise CommandError("--tokens is a number above 0 that goes with --shape")
    if options.prefix:
        raise CommandError("--prefix is of weights: give --part, the name of a submodule")
    out.parent.mkdir(parents=True, exist_ok=True)
    print(export_network(Path(options.ckpt).expanduser(), out, options.format, options.part, options.shape, options.tokens))
    return 0


def _export_saelens(checkpoint: Path, out: Path) -> int:
    from lit_methods.sparse_autoencoders.saelens import from_checkpoint, save_saelens

    try:
        folder = save_saelens(from_checkpoint(checkpoint), out)
    except FileExistsError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=2 if isinstance(error, OSError) else 1) from error
    print(f"{folder}: sae_lens.SAE.load_from_disk({str(folder)!r}) reads it")
    return 0


def parsed(parser: Parser, argv: list[str]) -> argparse.Namespace | None:
    """The options; None after ``--help``."""
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        return None
    return parser.parse_args(argv)


def __getattr__(name: str) -> Any:
    """Kept for code written against 0.1: ``read_state_dict`` stands in :mod:`lit_methods.runs.checkpoints`, which imports torch."""
    if name == "read_state_dict":
        from lit_methods.runs.checkpoints import read_state_dict

        return read_state_dict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
