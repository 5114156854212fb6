"""``lit completion bash | zsh | fish``: what a shell completes the ``lit`` command by.

The scripts ask ``lit completion --line "<what stands before the cursor>"``, which neither imports torch nor Lightning: names come from the
catalogue, from the sources and from Lightning's own source of the trainer.
"""

import ast
import functools
import glob
import importlib.util
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from lit_methods.catalog import installed_names, installed_techniques
from lit_methods.cli.commands import Parser, parsed
from lit_methods.cli.config_files import shipped_configs
from lit_methods.errors import CommandError

SCRIPTS = {
    "bash": """\
# lit completion for bash. In ~/.bashrc: source <(lit completion bash)
_lit_complete() {
  local line="${COMP_LINE:0:COMP_POINT}" found cut
  COMPREPLY=()
  while IFS= read -r found; do COMPREPLY+=("$found"); done < <(lit completion --line "$line" 2>/dev/null)
  local last="${line##* }"
  if [[ $last == *=* && $COMP_WORDBREAKS == *=* ]]; then  # bash takes what stands behind the = for a word
    cut="${last%%=*}="
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
  fi
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[./=] ]] && compopt -o nospace
}
complete -o default -F _lit_complete lit
""",
    "zsh": """\
# lit completion for zsh. In ~/.zshrc, behind compinit: source <(lit completion zsh)
_lit() {
  local -a found
  found=("${(@f)$(lit completion --line "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
  found=(${found:#})
  (( $#found )) && compadd -Q -S '' -- $found || _files
}
compdef _lit lit
""",
    "fish": """\
# lit completion for fish. In ~/.config/fish/config.fish: lit completion fish | source
complete -c lit -a '(lit completion --line (commandline -cp | string collect) 2>/dev/null)'
""",
}
RUN_COMMANDS = ("fit", "validate", "test", "predict")
RUN_KEYS = (
    *("--config", "--model", "--data", "--optimizer", "--lr_scheduler", "--ckpt_path", "--resume", "--name", "--run_root"),
    *("--seed_everything", "--print_config", "--help", "--help-all", "--debug", "--trainer.callbacks+=", "--trainer.logger+="),
    *("--model.help", "--data.help", "--trainer.callbacks.help"),
)
OPTIONS = {
    "list": ("--parts", "--configs", "--family", "--json"),
    "info": ("--json",),
    "runs": ("--best", "--metric", "--config", "--where", "--sort", "--top", "--min", "--max", "--json", "--run_root"),
    "report": ("--out", "--notes", "--no-media", "--force", "--run_root"),
    "claims": ("--plan", "--quick", "--jobs", "--setting", "--cost", "--page", "--root"),
    "compare": ("--plan", "--quick", "--jobs", "--page", "--root"),
    "sweep": (
        *("--trials", "--jobs", "--devices", "--root", "--again", "--plan"),
        *("--cluster", "--partition", "--minutes", "--gpus", "--cpus"),
    ),
    "export": ("--format", "--prefix", "--part", "--shape", "--tokens", "--force"),
    "schema": ("--out",),
    "cp": ("--force",),
    "new": ("--form", "--family", "--new-family", "--class", "--title", "--complete", "--package"),
    "dashboard": ("--dry-run",),
}


def completion(words: list[str]) -> int:
    """``lit completion bash | zsh | fish``."""
    parser = Parser(prog="lit completion", description="Print what your shell completes lit by; its first line says where it goes.")
    parser.add_argument("shell", nargs="?", help="bash, zsh or fish")
    parser.add_argument("--line", help="print what a line may go on with, one candidate per line; asked for by the scripts")
    options = parsed(parser, words)
    if options is None:
        return 0
    if options.line is not None:
        print(*candidates(options.line), sep="\n")
    elif options.shell in SCRIPTS:
        print(SCRIPTS[options.shell], end="")
    else:
        raise CommandError(f"no script for {options.shell!r}: lit completion bash, zsh or fish")
    return 0


def candidates(line: str) -> list[str]:
    """What the last word of a command line may become, whole words, sorted.

    Args:
        line: The line up to the cursor, ``lit`` included; a space at its end begins a new word.
    """
    words = _split(line)[1:]
    *before, last = words or [""]
    if not before:
        return _beginning(last, _commands())
    command, previous = before[0], before[-1]
    key, _, value = last.partition("=")
    if last.startswith("--") and "=" in last:
        found = _beginning(value, _values(command, key, value))
        return [f"{key}={one}" for one in found]
    if previous.startswith("--") and "=" not in previous and (values := list(_values(command, previous, last))):
        return _beginning(last, values)
    if last.startswith("-"):
        return _beginning(last, _keys(command, before, last))
    return _beginning(last, _arguments(command, before, last))


def _split(line: str) -> list[str]:
    text = line if line.strip() else "lit "
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(text + closing)
            break
        except ValueError:  # a quote that isn't closed yet
            continue
    else:
        words = text.split()
    return [*words, ""] if text[-1].isspace() else words


def _beginning(prefix: str, words: Iterable[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(prefix)})


def _commands() -> list[str]:
    from lit_methods.cli.main import _commands

    return [*RUN_COMMANDS, *_commands(), "--help", "--version"]


def _arguments(command: str, before: list[str], last: str) -> Iterable[str]:
    """What may stand without a key."""
    if command in ("info", "dashboard", "claims"):
        found = [*installed_techniques()]
        if command == "info":
            from lit_methods.parts import parts

            found += [entry.family for entry in installed_techniques().values()] + [part.name for part in parts()]
        return found
    if command == "compare":
        return [Path(path).stem for path in shipped_configs() if path.startswith("configs/compare/")]
    if command == "completion":
        return SCRIPTS
    if command in ("runs", "report"):
        return [f"{path.parent.name}" for path in Path("runs").glob("*/*/") if path.is_dir()]
    if (command in ("cp", "doctor", "fake") and len(before) == 1) or command == "schema":
        return [*(shipped_configs() if command != "schema" else ()), *_files(last, ".yaml")]
    return _files(last)


def _keys(command: str, before: list[str], last: str) -> Iterable[str]:
    """Keys that begin with two dashes."""
    if command not in (*RUN_COMMANDS, "doctor", "prune"):
        return (*OPTIONS.get(command, ()), "--help")
    found = [*RUN_KEYS]
    if last.startswith("--trainer."):
        found += [f"--trainer.{name}" for name in trainer_arguments()]
    for key in ("--model", "--data"):
        if last.startswith(f"{key}."):
            given = [word for at, word in enumerate(before) if at and before[at - 1] == key]
            given += [word.partition("=")[2] for word in before if word.startswith(f"{key}=")]
            found += [f"{key}.{name}" for name in class_arguments(given[-1].rpartition(".")[2])] if given else []
    return found


def _values(command: str, key: str, prefix: str) -> Iterable[str]:
    """What may stand behind a key; nothing where any word goes."""
    if key == "--config" and command in (*RUN_COMMANDS, "doctor", "prune", "soup"):
        return [*(path for path in shipped_configs() if "/claims/" not in path and "/compare/" not in path), *_files(prefix, ".yaml")]
    if key in ("--model", "--model.help"):
        return _of_kind("host module", "module")
    if key in ("--data", "--data.help"):
        return _of_kind("datamodule")
    if key in ("--trainer.callbacks+", "--trainer.callbacks.help"):
        return _of_kind("callback", "callback")
    if key == "--resume":
        return ("auto", "last")
    if key == "--family":
        return {entry.family for entry in installed_techniques().values()}
    if key == "--form":
        return ("term", "callback", "module", "datamodule")
    if key == "--format" and command == "export":
        return ("weights", "sae-lens")
    return ()


def _of_kind(kind: str, form: str = "") -> list[str]:
    """Public names of a kind of part, and the main classes of techniques of a form."""
    from lit_methods.parts import parts

    public = installed_names()
    found = [part.name for part in parts() if part.kind == kind and part.name in public]
    return found + [entry.names[0] for entry in installed_techniques().values() if form and entry.form == form and entry.names]


def _files(prefix: str, ending: str = "") -> list[str]:
    """Files that begin so, folders with a slash behind them."""
    paths = glob.glob(f"{glob.escape(prefix)}*")
    return [f"{path}/" if os.path.isdir(path) else path for path in paths if os.path.isdir(path) or path.endswith(ending)]


@functools.cache
def trainer_arguments() -> list[str]:
    """Arguments of Lightning's Trainer, from its source."""
    package = importlib.util.find_spec("lightning")
    if package is None or package.origin is None:
        return []
    source = Path(package.origin).parent / "pytorch" / "trainer" / "trainer.py"
    return _of_constructor(ast.parse(source.read_text(encoding="utf-8")), "Trainer")


def class_arguments(name: str) -> list[str]:
    """Arguments of one of our public classes, from its source; none for any other name."""
    from lit_methods.parts import sources

    for _, source, _ in sources():
        text = source.read_text(encoding="utf-8")
        if f"class {name}(" in text or f"class {name}:" in text:
            return _of_constructor(ast.parse(text), name)
    return []


def _of_constructor(tree: ast.Module, name: str) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    return [argument.arg for argument in (*method.args.args, *method.args.kwonlyargs) if argument.arg != "self"]
    return []
