"""Finding the YAML files that a command names: the current folder first, then those that ship with the package, then plugins'."""

import re
import shutil
from pathlib import Path

from lit_methods.catalog import configs_folders
from lit_methods.errors import CommandError, nearest
from lit_methods.files import refuse_repeated_keys

_CONFIG_FLAGS = ("--config", "-c")


def shipped_configs() -> list[str]:
    """Paths of the shipped configs, and of those of plugins, as a user writes them (``configs/superflow.yaml``), sorted."""
    return sorted(_shipped())


def _shipped() -> dict[str, Path]:
    """Path as a user writes it -> file; of two files of one name the one that :func:`find_config` finds."""
    return {
        f"configs/{path.relative_to(folder).as_posix()}": path for folder in reversed(configs_folders()) for path in folder.rglob("*.yaml")
    }


def config_heads() -> dict[str, str]:
    """Shipped config -> what its head says that it is: the text of its first comment, without the command; sorted by path."""
    return {path: _head(file.read_text(encoding="utf-8")) for path, file in sorted(_shipped().items())}


def _head(text: str) -> str:
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        said = re.sub(r"lit \w+ --config \S+", "", line.lstrip("# ")).strip()
        if said:
            return said
    claim = re.search(r"^claim: *\"?(.*?)\"?$", text, flags=re.M)
    return claim[1] if claim else ""


def find_config(given: str) -> Path:
    """The file that ``given`` names: relative to the current folder, else among the shipped configs.

    Args:
        given: A path; for shipped configs with or without the leading ``configs/`` and the ending ``.yaml``.

    Raises:
        CommandError: No such file in either place; the message holds the nearest names.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    inside = given.removeprefix("./").removeprefix("configs/")
    for shipped in (folder / candidate for folder in configs_folders() for candidate in (inside, f"{inside}.yaml")):
        if not path.is_absolute() and shipped.is_file():
            return shipped
    here = [str(found.relative_to(Path.cwd())) for found in [*Path.cwd().glob("*.y*ml"), *Path.cwd().glob("configs/**/*.y*ml")]]
    reason = f"config {given!r} is a folder, not a file" if path.is_dir() else f"config {given!r} not found"
    near = nearest(given, [*here, *shipped_configs()]) or nearest(f"configs/{given}.yaml", shipped_configs())
    raise CommandError(
        f"{reason}: looked in the current folder and among the shipped configs\n  "
        + (f"nearest: {', '.join(near)}" if near else "see `lit list`; `lit cp <config> <dest>` copies a shipped one to edit")
    )


def resolve_config_arguments(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Replace every ``--config X`` by the file that it names.

    Returns:
        The arguments with full config paths, and these paths in order.
    """
    resolved: list[str] = []
    files: list[Path] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in _CONFIG_FLAGS:
            resolved.append(word)
            continue
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise CommandError(f"{flag} needs a file: {flag} configs/<name>.yaml")
        files.append(find_config(value))
        resolved += ["--config", str(files[-1])]
    return resolved, files


def mentioned_files(argv: list[str], files: list[Path]) -> list[Path]:
    """``files`` and every further YAML file that they or the arguments name (``--trainer my_trainer.yaml``)."""
    found = list(files)
    pending = [(" ".join(argv), Path())] + [(path.read_text(encoding="utf-8", errors="replace"), path.parent) for path in files]
    while pending:
        text, folder = pending.pop()
        for name in re.findall(r"[^\s\"'=,{}\[\]]+\.(?:yaml|yml)\b", text):
            for path in (Path(name), folder / name):
                if path.is_file() and path not in found:
                    found.append(path)
                    pending.append((path.read_text(encoding="utf-8", errors="replace"), path.parent))
    return found


def refuse_repeated(argv: list[str], files: list[Path]) -> None:
    """Raise if a key stands twice in a mapping of a file or of an argument (``--trainer '{...}'``).

    Raises:
        CommandError: The file with line and key.
    """
    try:
        for path in files:
            refuse_repeated_keys(path.read_text(encoding="utf-8", errors="replace"), str(path))
        for word in argv:
            if "{" in word:
                refuse_repeated_keys(word.partition("=")[2] if word.startswith("-") else word, "command line")
    except ValueError as error:
        raise CommandError(str(error)) from error


def copy_config(config: str, destination: str, force: bool = False) -> Path:
    """Copy a config to ``destination`` (a file, or an existing folder) for editing.

    Raises:
        CommandError: The config does not exist, or the destination does and ``force`` is not set.
    """
    source = find_config(config)
    target = Path(destination).expanduser()
    if target.is_dir() or destination.endswith("/"):
        target = target / source.name
    if target.exists() and not force:
        raise CommandError(f"{target} exists: choose another name, or overwrite it with --force")
    if target.exists() and target.samefile(source):
        raise CommandError(f"{config} and {destination} are the same file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
