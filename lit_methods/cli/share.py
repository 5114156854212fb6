"""``lit push | pull``, and the folder that is shared: weights with their origin in the metadata, the config, and a model card."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_methods import __version__
from lit_methods.catalog import Technique, techniques_in
from lit_methods.claims.records import verdict_words
from lit_methods.cli.commands import DOCS, Parser, parsed
from lit_methods.errors import CommandError
from lit_methods.files import write_atomically

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS, CARD, CONFIG, ORIGIN = "model.safetensors", "README.md", "config.yaml", "origin.json"
FACTS = ("lit_methods", "python", "torch", "lightning", "precision", "started")  # of the environment; no paths and no names of machines


def run_of(checkpoint: Path) -> Path | None:
    """The run's folder that a checkpoint lies in, if it is one of ours."""
    folder = checkpoint.expanduser().resolve().parent.parent
    return folder if (folder / CONFIG).is_file() else None


def last_metrics(run: Path) -> dict[str, float]:
    """The last finite value of every metric of a run, {} without a history."""
    from lit_methods.reports.page import read_history, series_by_name
    from lit_methods.reports.record import HISTORY

    history = run / HISTORY
    series = series_by_name(read_history(history)) if history.is_file() else {}
    return {name: float(values[-1]) for name, (_, values) in series.items() if math.isfinite(values[-1])}


def origin(checkpoint: Path) -> dict[str, Any]:
    """Where a checkpoint's weights come from: versions, commit, config and last metrics of its run; only the version without a run."""
    run = run_of(checkpoint)
    if run is None:
        return {"lit_methods": __version__}
    from lit_methods.reports.record import read_config, run_facts

    facts = run_facts(run)
    environment = {name: facts["Environment"][name] for name in FACTS if name in facts["Environment"]}
    return {
        **environment,
        **({"commit": facts["Git"]["commit"]} if facts["Git"].get("commit") else {}),
        "checkpoint": checkpoint.name,
        "metrics": last_metrics(run),
        "config": read_config(run),
    }


def metadata(found: dict[str, Any]) -> dict[str, str]:
    """An origin as the texts that a file of safetensors holds beside its tensors."""
    return {"format": "pt", **{name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}}


def techniques_of(config: str) -> list[Technique]:
    """The techniques whose classes a config names."""
    names = {path.rpartition(".")[2] for path in class_paths(yaml.safe_load(config) if config else None)}
    return techniques_in(names) if names else []


def class_paths(value: Any) -> Iterator[str]:
    """Every class that a part of a config names."""
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for inner in value.values():
            yield from class_paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from class_paths(inner)


def model_card(name: str, found: dict[str, Any]) -> str:
    """What a reader of the shared folder sees: technique, evidence, metrics, and how the weights are read."""
    about = techniques_of(found.get("config", ""))
    head = {"library_name": "lit-methods", "tags": ["pytorch-lightning", *(entry.slug for entry in about)]}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    for entry in about:
        paper = f" ([arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv}))" if entry.arxiv else ""
        lines += [f'[{entry.name}]({DOCS}/{entry.slug}.md): {entry.summary} From "{entry.title}"{paper}.', ""]
        if entry.claim:
            lines += [f"What the project's own runs say about the paper's claim: {verdict_words(entry.slug)}.", ""]
    lines += [
        "## Weights",
        "",
        "```python",
        "from safetensors.torch import load_file",
        "",
        f'weights = load_file("{WEIGHTS}")  # name -> tensor',
        "",
        "from lit_methods import load_shared",
        "",
        'module = load_shared(".")  # the LightningModule; or this repository\'s name on the hub',
    ]
    lines += ["```", ""]
    if found.get("config"):
        lines += [f"`lit fit --config {CONFIG}` trains the same model anew.", ""]
    if metrics := found.get("metrics"):
        lines += ["## Last value of each metric", "", "| metric | value |", "|---|---|"]
        lines += [f"| `{metric}` | {value:.4g} |" for metric, value in sorted(metrics.items())] + [""]
    facts = [f"| {fact} | {value} |" for fact, value in found.items() if fact not in ("config", "metrics")]
    return "\n".join([*lines, "## Origin", "", "| | |", "|---|---|", *facts, ""])


def export_folder(checkpoint: Path, out: Path, weights: dict[str, Any]) -> None:
    """Write a new folder with the weights, their config, their origin and a model card.

    Raises:
        CommandError: The folder holds something.
    """
    from safetensors.torch import save_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{out} is there already: give a new or an empty folder")
    found = origin(checkpoint)
    run = run_of(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, out / WEIGHTS, metadata=metadata(found))
    if found.get("config"):
        write_atomically(out / CONFIG, found["config"])
    write_atomically(out / ORIGIN, json.dumps({name: value for name, value in found.items() if name != "config"}, indent=1) + "\n")
    write_atomically(out / CARD, model_card(run.parent.name if run is not None else checkpoint.stem, found))


def push(argv: list[str]) -> int:
    """``lit push <folder> <user/name>``: a folder of ``lit export`` to the Hugging Face hub."""
    parser = Parser(prog="lit push", description="Put a folder that `lit export` wrote on the Hugging Face hub.")
    parser.add_argument("folder", help="as `lit export <ckpt> <folder> --format folder` writes it")
    parser.add_argument("name", help="name on the hub, such as me/my-model; made if it isn't there")
    parser.add_argument("--private", action="store_true", help="make it private, if it is made")
    parser.add_argument("--message", default="", help="message of the commit")
    options = parsed(parser, argv)
    if options is None:
        return 0
    folder = Path(options.folder).expanduser()
    if missing := [file for file in (WEIGHTS, CARD) if not (folder / file).is_file()]:
        raise CommandError(f"{folder} has no {missing[0]}: first lit export <ckpt> {folder} --format folder")
    with _hub(options.name) as hub:
        hub.create_repo(options.name, private=options.private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=options.name, folder_path=folder, commit_message=options.message or f"Weights from lit-methods {__version__}"
        )
    print(f"{done.commit_url}\n  lit pull {options.name} <folder>")
    return 0


def pull(argv: list[str]) -> int:
    """``lit pull <user/name> <folder>``: what ``lit push`` put on the hub."""
    parser = Parser(prog="lit pull", description="Fetch a model from the Hugging Face hub into a folder.")
    parser.add_argument("name", help="name on the hub, such as me/my-model")
    parser.add_argument("folder", help="a new or an empty folder")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    options = parsed(parser, argv)
    if options is None:
        return 0
    folder = Path(options.folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{folder} is there already: give a new or an empty folder")
    with _hub(options.name) as hub:
        hub.snapshot_download(options.name, revision=options.revision, local_dir=folder)
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    print(f"{folder}: {', '.join(files)}")
    if CONFIG in files:
        print(f"  lit fit --config {folder / CONFIG}")
    return 0


@contextmanager
def _hub(name: str) -> Iterator["HfApi"]:
    """The hub's client, whose errors become short messages."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(library_name="lit-methods", library_version=__version__)
    try:
        yield api
    except HFValidationError as error:
        raise CommandError(f"{name!r} is no name on the hub ({str(error).splitlines()[0]}): give one such as me/my-model") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        login = "; `hf auth login` or HF_TOKEN says who you are" if status in (401, 403) else ""
        raise CommandError(f"the hub refuses {name} ({status}): {str(error).splitlines()[0]}{login}", exit_code=1) from error
    except OSError as error:
        raise CommandError(f"the hub can't be reached for {name}: {str(error).splitlines()[0]}", exit_code=1) from error
