"""The ``lit`` command. Nothing heavy is imported before a command needs it."""

import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable

from lit_methods import __version__
from lit_methods.cli.output import steady_output
from lit_methods.errors import CommandError, suggest

HELP = """\
usage: lit <command> [arguments]

Train and evaluate
  fit, validate, test, predict    run a config, or any LightningModule
      lit fit --config configs/superflow.yaml
      lit fit --config base.yaml --config configs/trainer/gpu.yaml --config configs/logger/wandb.yaml
      lit fit --model my_project.MyModule --data my_project.MyData --trainer.max_epochs 3
      lit test --config runs/superflow/<time>/config.yaml --ckpt_path runs/superflow/<time>/checkpoints/last.ckpt
  soup --config FILE              prune in phases, retrain several candidates of each, average them (Sparse Model Soups)

Look around
  list [--family F] [--json]      techniques that are here; --parts: what one builds with; --configs: what runs
  info <technique|family|class>   what it does, its configs, how to run it

Before a long run
  doctor <config> [overrides]     are data, weights, GPUs, disk there? parameters, memory, steps; nothing is trained or downloaded
  fake <datamodule|config> <root> a tiny release in the benchmark's official layout, to try a pipeline without the data

Believe and see
  claims [technique...]           re-show the claims of the papers: method against baseline, verdict, evidence
  compare <family>                all techniques of a family on one task at equal budget
  sweep <file>                    many runs of one config whose keys are drawn, from a file in W&B's format; goes on where it stopped
  report <run>...                 one run's report anew, or several runs side by side
  dashboard <technique>           a W&B workspace with the technique's panels

Files
  cp <config> <dest>              copy a shipped config to edit
  export <ckpt> <out>             state dict, ONNX or torch.export graph, or a folder with a model card; push, pull: it to the hub and back
  prune --config FILE <out>       prune a trained model once, as DSnoT, Wanda, ... in the config say; a Hugging Face folder or a state dict
  idf <corpus.jsonl> <out>        table of inverse document frequencies of a corpus, by several processes
  encode <config>=<ckpt> <out>    documents of a sparse retriever for Anserini or OpenSearch, or the model for sentence-transformers
  search <config>=<ckpt>... --out index a collection by each retriever, query it, measure it, beside BM25
  neighbours <folder> <out.npz>   each image's nearest ones by a network's features, for CoTAP's streams
  lift <root>                     masks of images as masks of points: from files, by SAM 2, or superpoints, for MaskLabelSpreading
  runs [name...] [--best METRIC]  table of the runs here: figures, filters, the best of them
  schema, completion              JSON schema of configs for editors; what bash, zsh or fish completes lit by
  new <slug> --form term          skeleton of a technique (term, callback, module) or datamodule, here or in a package of yours

Any command: --help. `lit fit --help` for the keys of a run. --debug shows full tracebacks. lit --version
"""

RUN_HELP = """\
usage: lit {command} [--config FILE]... [--key value]...

  --config FILE               a YAML file; later ones override earlier ones; current folder first, then shipped configs
  --model CLASS               short name of one of ours (SuperFlow), or a dotted path of yours (my_project.MyModule)
  --data CLASS                the same for a LightningDataModule
  --model.ARG, --data.ARG     an argument of that class
  --trainer.ARG               an argument of lightning.pytorch.Trainer, such as --trainer.max_steps 100
  --trainer.callbacks+=CLASS  add a callback; --trainer.callbacks.ARG sets an argument of the last one
  --optimizer, --lr_scheduler for modules without configure_optimizers: a class of torch.optim
  --ckpt_path, --resume FILE  checkpoint to load or to go on from; --resume last: the newest of the same name, in a new folder
  --resume auto               fit: go on with the newest unfinished run of this name and config in its own folder, start anew
                              where there is none, do nothing where it has finished: one command for a job that is requeued
  --name, --run_root          the run's folder is <run_root>/<name>/<time>; default runs/<stem of first config>
  --seed_everything N         default 0
  --print_config              print the resolved config and stop

  lit {command} --model.help SuperFlow     all arguments of a class (also --data.help, --trainer.callbacks.help, ...)
  lit {command} --help-all                 every key of the trainer
"""

OF_TECHNIQUES = {"soup": "lit_methods.callbacks.sparsity.sparse_model_soups.command"}  # command -> module that has it
RUN_COMMANDS = ("fit", "validate", "test", "predict")
LONG_COMMANDS = ("claims", "compare", "prune", "sweep")


def main(argv: list[str] | None = None, tell: Callable[[Exception], None] | None = None) -> int:
    """Run the ``lit`` command.

    Args:
        argv: Words after the program's name; None: those of the process.
        tell: Gets the error that is printed as a short message.

    Returns:
        Exit status: 0, 1 for bad data, a missing library or a failed machine, 2 for a mistake in the arguments or configs, 143 for
        a fit that SIGTERM or SIGUSR1 has stopped behind a checkpoint, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("LIT_METHODS_DEBUG", "") not in ("", "0")
    words = [_at_home(word) for word in words if word != "--debug"]
    with steady_output(tell=bool(words) and words[0] in (*RUN_COMMANDS, *LONG_COMMANDS) and os.environ.get("LOCAL_RANK", "0") == "0"):
        return _run(words, debug, tell)


def _run(words: list[str], debug: bool, tell: Callable[[Exception], None] | None) -> int:
    """Run the command, with mistakes as short messages; its exit status."""
    try:
        return _dispatch(words)
    except SystemExit as stop:  # the parser after --print_config and --model.help; Lightning after Ctrl-C
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        if debug:
            traceback.print_exception(error)
        if tell is not None:
            tell(error)
        rank = os.environ.get("LOCAL_RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {known}", file=sys.stderr)
        return known.exit_code


def _at_home(word: str) -> str:
    """``word`` with a leading ``~`` as the home folder: the shell doesn't replace it in ``--key=~/path``."""
    key, path = re.match(r"(--[\w.+-]+=)?(.*)", word, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{key or ''}{os.path.expanduser(path)}" if path == "~" or path.startswith("~/") else word


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0
    if words[0] in ("--version", "version"):
        print(f"lit-methods {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command in RUN_COMMANDS:
        if "--help" in rest or "-h" in rest:
            print(RUN_HELP.format(command=command), end="")
            return 0
        from lit_methods.cli import lightning_cli

        return lightning_cli.run([command, *("--help" if word == "--help-all" else word for word in rest)])
    commands = _commands()
    if command not in commands:
        raise CommandError(f"lit has no command {command!r}" + suggest(command, [*RUN_COMMANDS, *commands]) + "\n  see: lit --help")
    return commands[command](rest)


def _commands() -> dict[str, Callable[[list[str]], int]]:
    from lit_methods.cli import (
        claims,
        commands,
        completion,
        dashboard,
        doctor,
        fake,
        lift,
        neighbours,
        prune,
        report,
        retrieval,
        runs,
        scaffold,
        schema,
        share,
        sweep,
    )

    return {
        "claims": claims.claims,
        "compare": claims.compare,
        "sweep": sweep.sweep,
        "report": report.report,
        "runs": runs.runs,
        "dashboard": dashboard.dashboard,
        "list": commands.list_techniques,
        "info": commands.info,
        "cp": commands.copy,
        "export": commands.export,
        "push": share.push,
        "pull": share.pull,
        "prune": prune.prune,
        "idf": retrieval.idf,
        "encode": retrieval.encode,
        "search": retrieval.search,
        "neighbours": neighbours.neighbours,
        "lift": lift.lift,
        "schema": schema.schema,
        "completion": completion.completion,
        "new": scaffold.new,
        "fake": fake.fake,
        "doctor": doctor.doctor,
        **{name: functools.partial(_of_technique, module, name) for name, module in OF_TECHNIQUES.items()},
    }


def _of_technique(module: str, name: str, words: list[str]) -> int:
    """Run a technique's own command, a function of its name; no shared piece imports a technique."""
    status: int = getattr(importlib.import_module(module), name)(words)
    return status


def _known(error: Exception) -> CommandError | None:
    """``error`` as a short message when it is one that a user can act on; None for a defect, which keeps its traceback."""
    if isinstance(error, CommandError):
        return error
    if "torch" not in sys.modules:
        return None
    from lit_methods.cli.explain import explain_run_error

    return explain_run_error(error)


if __name__ == "__main__":
    from lit_methods.import_path import current_folder_last

    current_folder_last()
    raise SystemExit(main())
