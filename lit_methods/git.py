"""What a git checkout says of itself, without running a program that its configuration names.

A checkout that somebody else has packed brings its own ``.git/config``, and git runs programs out of it even where it only looks: file
system monitors, clean and smudge filters, hooks, external diffs, text conversions. All of our calls to git go through :func:`git`.
"""

import os
import re
import subprocess
from pathlib import Path

# Settings that name programs, switched off for our calls. An empty core.fsmonitor means none to every git; older ones run "false".
_OFF = {
    "core.fsmonitor": "",
    "core.hooksPath": os.devnull,
    "core.pager": "cat",
    "diff.external": "",
    "log.showSignature": "false",  # runs gpg.program
    "submodule.recurse": "false",
}
# Text conversions and external diffs belong to attributes of files, and a submodule is looked at with the submodule's own configuration.
_FLAGS = {
    "diff": ("--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty"),
    "show": ("--no-ext-diff", "--no-textconv"),
    "log": ("--no-ext-diff", "--no-textconv", "--no-show-signature"),
    "status": ("--ignore-submodules=dirty",),
}
_READS_FILES = ("diff", "status")  # of the working tree, through its filters


class UnknownFilter(subprocess.SubprocessError):
    """A checkout has a filter whose name can't be given on a command line, so it can't be switched off."""


def git(folder: Path | str, *words: str, timeout: float = 60) -> str:
    """What a git command that only looks says on its standard output.

    Switched off are the checkout's fsmonitor, hooks, filters (``filter.*.clean``, ``smudge``, ``process``), external diffs, text
    conversions, the checking of signatures, the pager, every transport (a partial clone would fetch), and writing to the index. So a
    file that goes through a filter, such as those of Git LFS, counts as changed where its time or size has changed. Of a submodule the
    commit is looked at, not its files.

    Args:
        folder: A folder of the checkout.
        words: The command and its arguments, such as ``"diff", "--stat", "HEAD"``.
        timeout: Seconds.

    Raises:
        subprocess.SubprocessError: Git says no (``CalledProcessError``), takes too long, or the checkout has a filter of a strange name.
        OSError: There is no git.
    """
    settings = dict(_OFF)
    if words[0] in _READS_FILES:
        settings |= _filters_off(folder, timeout)
    return _run(folder, settings, [words[0], *_FLAGS.get(words[0], ()), *words[1:]], timeout)


def _filters_off(folder: Path | str, timeout: float) -> dict[str, str]:
    try:
        listed = _run(folder, _OFF, ["config", "--null", "--name-only", "--get-regexp", r"^filter\."], timeout)
    except subprocess.CalledProcessError:  # there are none
        return {}
    names = {key.partition(".")[2].rpartition(".")[0] for key in listed.split("\0") if key}
    if strange := [name for name in names if not re.fullmatch(r"[^=\n\ufffd]+", name)]:
        raise UnknownFilter(f"filter {strange[0]!r} of the checkout in {folder} can't be switched off")
    programs = {"clean": "", "smudge": "", "process": "", "required": "false"}
    return {f"filter.{name}.{key}": value for name in names for key, value in programs.items()}


def _run(folder: Path | str, settings: dict[str, str], words: list[str], timeout: float) -> str:
    command = ["git", "-C", str(folder), "--no-pager", "--no-optional-locks"]
    for key, value in settings.items():
        command += ["-c", f"{key}={value}"]
    said = {
        "GIT_ALLOW_PROTOCOL": "none",  # over what protocol.<name>.allow says in the checkout
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }
    environment = {key: value for key, value in os.environ.items() if key != "GIT_EXTERNAL_DIFF"} | said
    done = subprocess.run(
        [*command, *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        check=True,
    )
    return done.stdout
