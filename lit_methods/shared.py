"""Models out of a folder that ``lit export --format folder`` wrote, or out of a repository of the Hugging Face hub that holds one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_methods.catalog import PACKAGES
from lit_methods.cli.share import CONFIG, WEIGHTS, class_paths
from lit_methods.errors import suggest
from lit_methods.files import read_yaml

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

OURS = (*(f"{package}." for package in PACKAGES), "torch.", "lightning.")


def load_shared(name: str | Path, revision: str | None = None, trusted: bool = False) -> "LightningModule":
    """The LightningModule of a shared model, with its weights, in eval mode on the CPU.

    The folder holds ``config.yaml``, which says how the module is built, and ``model.safetensors``. Only classes of this package, of torch
    and of Lightning are imported for it, as a config from elsewhere could name anything.

    Args:
        name: A folder, or a name on the hub such as ``me/my-model``, which is fetched into the hub's cache.
        revision: Branch, tag or commit on the hub; None: main.
        trusted: Import other classes that the config names, too.

    Raises:
        FileNotFoundError: Neither a folder nor a model of the hub.
        ValueError: A file is missing or broken, weights belong to another module, or the config names a class of others.

    Example:
        >>> from lit_methods import load_shared
        >>> module = load_shared("checkpoints/ict_digits")  # doctest: +SKIP
    """
    folder = _folder(name, revision)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"{name} has no {file}: give a folder that `lit export <ckpt> <folder> --format folder` wrote")
    section = (read_yaml(folder / CONFIG) or {}).get("model")
    if not isinstance(section, dict) or "class_path" not in section:
        raise ValueError(f"{name}: its {CONFIG} has no model with a class_path")
    foreign = [path for path in class_paths(section) if not path.startswith(OURS)]
    if foreign and not trusted:
        raise ValueError(f"{name} needs {foreign[0]}, which isn't of lit_methods: load it with trusted=True if you know what that imports")
    from safetensors.torch import load_file

    module = _built(section)
    module.configure_model()
    _fill(module, load_file(folder / WEIGHTS), str(name))
    return module.eval()


def _folder(name: str | Path, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if str(name).count("/") != 1 or folder.suffix or str(name).startswith((".", "/", "~")):
        near = [str(path) for path in folder.parent.glob("*") if (path / WEIGHTS).is_file()] if folder.parent.is_dir() else []
        raise FileNotFoundError(f"{name} is no folder{suggest(str(name), near, 'give one, or a name on the hub such as me/my-model')}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise FileNotFoundError(f"{name} is no folder, and the hub doesn't give it: {reason}") from error


def _built(section: dict[str, Any]) -> "LightningModule":
    """The object that a section of a config describes."""
    from jsonargparse import ArgumentError, Namespace
    from lightning.pytorch import LightningModule
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    try:
        module: LightningModule = parser.instantiate_classes(parser.parse_object(Namespace(model=section)))["model"]
    except ArgumentError as error:
        raise ValueError(f"{section['class_path']} can't be built from this config: {str(error).splitlines()[0]}") from error
    return module


def _fill(module: "LightningModule", weights: dict[str, Any], name: str) -> None:
    """Load weights, all of them or none."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(
            f"the weights of {name} don't fit {type(module).__name__}: {' '.join(line.strip() for line in lines[1:3])}"
        ) from error


__all__ = ["load_shared"]
