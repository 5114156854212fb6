"""Trains the small models of ``checkpoints.yaml`` and writes each as a folder to share, as ``make checkpoints`` does.

    python docs/tools/checkpoints.py [name]... [--out checkpoints] [--push user] [--runs runs/checkpoints]

Each becomes ``<out>/<name>/`` with weights, config, origin and model card (``lit export --format folder``), and all of them an
``index.json``: config, commit, last metrics, bytes and SHA-256 of the weights. ``lit_methods.load_shared("checkpoints/<name>")`` loads one;
with ``--push me`` they go to the hub as ``me/<name>``. A folder that is there is left as it is; a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lit_methods.errors import suggest
from lit_methods.files import read_yaml, write_json

LIST = Path(__file__).with_suffix(".yaml")


def lit(*words: object) -> None:
    """Run ``lit``; leave where it fails."""
    command = [sys.executable, "-m", "lit_methods", *map(str, words)]
    print("lit", *words, flush=True)
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)


def make(name: str, config: str, runs: Path, out: Path) -> None:
    """Train one model and write its folder."""
    lit("fit", "--config", f"configs/{config}", "--run_root", runs, "--name", name, "--resume", "auto")
    finished = sorted((runs / name).glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if not finished:
        sys.exit(f"{runs / name} has no checkpoint: does {config} switch them off?")
    lit("export", finished[-1], out / name, "--format", "folder")


def entry(folder: Path, config: str) -> dict[str, Any]:
    """What the index says of a model."""
    weights = folder / "model.safetensors"
    origin = json.loads((folder / "origin.json").read_text(encoding="utf-8"))
    return {
        "config": config,
        **{key: origin[key] for key in ("commit", "lit_methods", "torch", "metrics") if key in origin},
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def main() -> None:
    """Make what is missing, then write the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"))
    parser.add_argument("--runs", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--push", metavar="USER", help="put them on the Hugging Face hub, too")
    options = parser.parse_args()
    known: dict[str, str] = read_yaml(LIST)
    for name in options.names:
        if name not in known:
            sys.exit(f"no model {name!r} in {LIST.name}{suggest(name, known)}")
    for name in options.names or known:
        if not (options.out / name).is_dir():
            make(name, known[name], options.runs, options.out)
        if options.push:
            lit("push", options.out / name, f"{options.push}/{name}")
    made = {name: entry(options.out / name, config) for name, config in known.items() if (options.out / name).is_dir()}
    write_json(options.out / "index.json", made)
    print(f"{options.out / 'index.json'}: {len(made)} models, {sum(one['bytes'] for one in made.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
