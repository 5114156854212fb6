"""What the golden adapters test is what runs: a function that they call and no run reaches is computed twice, and once unproven.

For each technique the functions of ours that its golden adapters call are traced, and those that short runs of ``lit`` reach: its configs,
validated, tested and resumed; settings that no config has; the stages of its claim. Runs end as soon as nothing is missing.
"""

import contextlib
import functools
import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_catalogue import SHORTENED, TINY

import reached
from golden import GOLDEN_DIR, GoldenCase
from lit_methods.catalog import configs_folder, techniques
from lit_methods.claims.plan import QUICK_WORDS, stage_words
from lit_methods.claims.study import read_study
from lit_methods.cli.main import main
from reached import reached_functions

# the full recipe, small: guidance, and attention that passes on a tangent
_WAN = (
    "--config configs/full/rcm_wan1b.yaml --data.init_args.root null --data.init_args.null_embedding null --data.init_args.tokens null "
    "--data.init_args.num_workers 0 --trainer.devices 1 --trainer.strategy auto --trainer.precision 32-true "
    "--model.init_args.teacher_weights null --model.init_args.tangent_warmup 1 --model.init_args.student_every 2 "
) + " ".join(
    f"--model.init_args.teacher.init_args.{name} {value}"
    for name, value in {"channels": 4, "width": 24, "hidden": 16, "heads": 2, "depth": 1, "text_width": 16}.items()
)
# settings of the public classes that no config and no claim has: slug -> words, one run each; the first config is used unless they name one
SETTINGS = {
    "adawac": ["--trainer.callbacks.mode reweight-only"],
    "adele": ["--trainer.callbacks.rule slices", "--trainer.callbacks.eval_interval 1"],
    "conr": ["--trainer.callbacks.variant dense"],
    "dsl_recommendation": ["--trainer.callbacks.interval 2"],
    "ict": ["--config configs/ct.yaml --model.init_args.metric l1"],
    "issp": ["--trainer.callbacks.pick min_2:4 --trainer.callbacks.prune_iters 4"],
    "masksparsity": ["--trainer.callbacks.criterion threshold"],
    "progressive_gradient_flow": ["--trainer.callbacks.recipe sdgf_stepwise", "--trainer.callbacks.rate 0.5"],
    "random_pruning": [f"--trainer.callbacks.method {method}" for method in ("snip", "grasp")],
    "rcm": [_WAN, "--config configs/rcm.yaml --model.init_args.consistency dcm --model.init_args.pretrain_iterations 0"],
    "slct": ["--model.init_args.metric geman_mcclure"],
    "sparse_ift": [
        *(f"--trainer.callbacks.family {family} --trainer.callbacks.interval 2" for family in ("parallel", "factorized", "doped")),
        "--trainer.callbacks.anneal exponential --trainer.callbacks.interval 2",
    ],
}
# functions that no run can reach: name as in reached.py, without the line -> why
EXCEPTIONS: dict[str, str] = {}


def called_by_adapters(slug: str) -> set[str]:
    """Functions of ours that the technique's golden adapters call, on all of its cases."""
    kinds = importlib.import_module(f"test_{slug}").test_golden.kinds
    with reached_functions() as called:
        for path in sorted((GOLDEN_DIR / slug).glob("*.npz")):
            kinds[path.stem.rpartition("-")[0]].adapter(GoldenCase(path))
    return called


def lit(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(words)
    assert status == 0, f"lit {' '.join(words)}\n{said.getvalue()[-3000:]}"


def runs(slug: str, root: Path) -> Iterator[Callable[[], None]]:
    """Short runs of a technique, the likeliest first; a later one may need the checkpoint of an earlier one."""
    entry, fit, part = techniques()[slug], TINY.split(), ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
    number = iter(range(1000))

    def new_root() -> list[str]:
        return ["--run_root", str(root / str(next(number)))]

    def last_checkpoint() -> str:
        return str(max(root.rglob("last.ckpt"), key=lambda path: int(path.relative_to(root).parts[0])))

    first = ["--config", f"configs/{entry.configs[0]}"]
    configs = [[*first, *SHORTENED.get(slug, "").split()], *(["--config", f"configs/{config}"] for config in entry.configs[1:])]
    for index, words in enumerate(configs):
        yield functools.partial(lit, ["fit", *words, *fit, *new_root()])
        checkpoint = ["--ckpt_path", last_checkpoint()]
        for command in ("validate", "test"):
            yield functools.partial(lit, [command, *words, *part, *checkpoint, *new_root()])
        if index == 0:
            yield functools.partial(lit, ["fit", *words, *fit, *checkpoint, *new_root()])
            for setting in SETTINGS.get(slug, ()):
                given = [] if setting.startswith("--config") else first
                yield functools.partial(lit, ["fit", *given, *setting.split(), *fit, *new_root()])
    study = read_study(configs_folder() / "claims" / f"{slug}.yaml")
    chains = [*study.arms.values(), *([*study.arms[report.arm], report.stage] for report in study.reports if report.stage)]
    done: dict[str, str] = {}
    for chain in chains:
        checkpoint_of = ""
        for stage in chain:
            cut = QUICK_WORDS if stage.command == "fit" else part
            words = [word.replace("{checkpoint}", checkpoint_of) for word in stage_words(stage, 0, study.seed_keys, cut)]
            if " ".join(words) not in done:
                yield functools.partial(lit, [*words, *new_root()])
                done[" ".join(words)] = last_checkpoint() if stage.command == "fit" else checkpoint_of
            checkpoint_of = done[" ".join(words)]


def without_line(name: str) -> str:
    path, _, rest = name.partition(":")
    return f"{path} {rest.partition(' ')[2]}"


ALL = [pytest.param(slug, marks=[] if slug == "tcm" else pytest.mark.thorough) for slug in sorted(techniques())]


@pytest.mark.parametrize("slug", ALL)
def test_what_the_golden_adapters_call_is_reached_by_a_run(slug: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        missing = {name for name in called_by_adapters(slug) if without_line(name) not in EXCEPTIONS}
        for run in runs(slug, tmp_path):
            with reached_functions() as ours:
                run()
            missing -= ours
            if not missing:
                break
    finally:
        torch.set_num_threads(threads)
    assert not missing, (
        f"golden vectors of {slug} test functions that no run reaches:\n  " + "\n  ".join(sorted(missing)) + "\n  let the wiring call them,"
        " let the adapter test what runs, or add a setting that reaches them to SETTINGS"
    )


@pytest.mark.catalogue
def test_exceptions_are_still_called_by_adapters() -> None:
    called = {without_line(name) for slug in techniques() for name in called_by_adapters(slug)} if EXCEPTIONS else set()
    assert set(EXCEPTIONS) <= called, f"not needed any more: {sorted(set(EXCEPTIONS) - called)}"


def test_functions_are_found_by_name_and_nothing_else_is() -> None:
    from lit_methods.callbacks.sparsity.masks import keep_largest

    with reached_functions() as found:
        keep_largest(torch.rand(4).half(), 2)
        [len(str(value)) for value in range(2)]
    assert {without_line(name) for name in found} == {"callbacks/sparsity/masks.py keep_largest", "callbacks/sparsity/masks.py _comparable"}
    assert reached.sys.gettrace() is None or "reached" not in str(reached.sys.gettrace())
