"""Files that are whole or not there, and YAML in which every key counts."""

import contextlib
import functools
import json
import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

# libyaml, which PyYAML's wheels bring, is ten times as fast
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_PARTIAL = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.tmp")  # names of `replacing`


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to, which takes the place of ``path`` when the block ends, and leaves it as it was when the block raises.

    Readers see the old file or the new one, never half of one. Several processes may write the same path: the last one wins.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        A path in the same folder (a rename across file systems would be a copy), hidden, and removed if anything goes wrong.

    Raises:
        OSError: The file can't be written or moved; ``path`` is as it was.

    Example:
        >>> with replacing(Path("weights.npz")) as partial:  # doctest: +SKIP
        ...     numpy.savez(partial.open("wb"), weight=weight)
    """
    name = os.fsdecode(os.fsencode(path.name)[:180])  # a name has 255 bytes at most
    partial = path.with_name(f".{name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is what counts
            partial.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """Eight hex digits for the host and its numbering of processes: containers of one host may each have their own."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        processes = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {processes}'.encode(errors='replace')):08x}"


def remove_dead(folder: Path) -> None:
    """Delete the temporary files of :func:`replacing` that processes of this machine left in ``folder`` and were killed.

    Others may be writing there: what a living process, one of another machine, or another program has written stays. Looked at are the
    folder and those in it, since a metric's ``/`` in the name of a checkpoint makes one. A folder that can't be read is left as it is.
    """
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        name = _PARTIAL.fullmatch(path.name)
        if name is not None and name["machine"] == _machine() and not path.is_symlink() and _has_ended(int(name["pid"])):
            with contextlib.suppress(OSError):  # another start was faster, or it is another user's
                path.unlink()


def _has_ended(pid: int) -> bool:
    """Whether no process of this machine has the number; False where that can't be told."""
    if os.name == "nt":  # a signal 0 isn't a question there
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def try_lock(file: Path) -> TextIO | None:
    """The file, locked for this process until it is closed or the process ends; None where another one has it."""
    import fcntl

    handle = file.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


def write_atomically(path: Path, content: str | bytes) -> None:
    r"""Write a whole file or nothing: :func:`replacing` for content that is at hand. Text is written as UTF-8.

    A byte of a file name or an argument that isn't UTF-8, which Python keeps as a lone surrogate, is written as ``\udcff``.
    """
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def refuse_repeated_keys(text: str, where: str) -> None:
    """Raise if a mapping of a YAML text has a key twice: YAML's readers keep the last one and drop the others without a word.

    Args:
        text: YAML. What can't be parsed passes: the reader says what is wrong with it.
        where: Its file, for the message.

    Raises:
        ValueError: The key, its line and the line where it stood first.
    """
    try:
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError:
        return
    pending, visited = [root] if root is not None else [], set()
    while pending:
        node = pending.pop()
        if id(node) in visited:  # an alias
            continue
        visited.add(id(node))
        lines: dict[str, int] = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(
                        f"{where}, line {line}: key {key.value!r} stands twice, first in line {lines[key.value]}, "
                        "and only one would count\n  put what stands below both under one of them"
                    )
                lines[key.value] = line
            pending.append(value)
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)


def load_yaml(text: str) -> Any:
    """``yaml.safe_load`` by libyaml, and by PyYAML's own parser, whose messages are better, if that fails.

    Raises:
        yaml.YAMLError: It is no YAML.
    """
    loader = _LOADER(text)
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, UnicodeError):
        return yaml.safe_load(text)
    finally:
        loader.dispose()


def dump_yaml(content: Any) -> str:
    """``yaml.safe_dump`` with keys in their order and letters as they are, by libyaml where it can write them (not a lone surrogate).

    Raises:
        yaml.YAMLError: An object that YAML has no form for.
    """
    try:
        return yaml.dump(content, Dumper=_DUMPER, default_flow_style=False, sort_keys=False, allow_unicode=True)
    except UnicodeError:
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises:
        ValueError: A key stands twice in one mapping.
        yaml.YAMLError: It is no YAML.
        OSError: It can't be read.
    """
    text = path.read_text(encoding="utf-8")
    refuse_repeated_keys(text, str(path))
    return load_yaml(text)


def shown(path: Path) -> str:
    """A path as a user reads it: below the current folder where it lies there, else as it is."""
    place = path.resolve()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(path)
