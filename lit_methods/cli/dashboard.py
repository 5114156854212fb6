"""``lit dashboard``: a W&B workspace with a technique's panels."""

import json
from collections.abc import Callable
from typing import TypeVar

from lit_methods.catalog import installed_techniques
from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError, suggest

T = TypeVar("T")


def dashboard(words: list[str]) -> int:
    """``lit dashboard <technique>``: save the technique's workspace to W&B, or print it.

    Raises:
        CommandError: Unknown technique, a missing library, no W&B login, or W&B can't be reached or refuses.
    """
    parser = Parser(prog="lit dashboard", description="A W&B workspace with the technique's panels, for runs that have its tag.")
    parser.add_argument("technique", help="slug, as `lit list` shows it")
    parser.add_argument("--entity", help="W&B user or team; default: that of the login")
    parser.add_argument("--project", default="lit-methods", help="W&B project (default: %(default)s, as in configs/logger/wandb.yaml)")
    parser.add_argument("--name", help="name of the saved view; default: `lit-methods: <technique>`")
    parser.add_argument("--dry-run", action="store_true", help="print the structure; needs no login and no network")
    parser.add_argument("--json", action="store_true", help="print what W&B would get, as JSON; sends nothing")
    options = parsed(parser, words)
    if options is None:
        return 0
    known = installed_techniques()
    if options.technique not in known:
        raise CommandError(f"no technique {options.technique!r}" + suggest(options.technique, known, otherwise="see: lit list"))
    sends = not (options.dry_run or options.json)
    if sends:
        from lit_methods.runs.wandb import has_login

        if not has_login():
            raise CommandError(
                "no W&B login on this machine: run `wandb login` first, or look at the workspace with --dry-run", exit_code=1
            )
    try:
        from lit_methods.reports.workspace import lines, spec, workspace

        entity = options.entity or (_asked(_own_entity) if sends else "<your entity>")
        space = workspace(known[options.technique], entity, options.project, options.name)
    except ImportError as error:
        raise CommandError(f"the workspace of {options.technique} can't be built: {error}", exit_code=1) from error
    if options.json:
        print(json.dumps(spec(space), indent=2, ensure_ascii=False))
    elif options.dry_run:
        print("\n".join(lines(space)))
    else:
        _asked(space.save)
        print(_asked(lambda: space.url))
    return 0


def _own_entity() -> str:
    import wandb

    return str(wandb.Api().default_entity)


def _asked(action: Callable[[], T]) -> T:
    try:
        return action()
    except Exception as error:  # W&B's client raises those of several libraries
        said = (str(error).strip() or "no message").splitlines()[0]
        raise CommandError(
            f"W&B did not take the workspace: {type(error).__name__}: {said}\n  check the network, the login, --entity and --project",
            exit_code=1,
        ) from error
