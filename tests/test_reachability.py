"""What the golden adapters test is what runs: a function that they call and no run reaches is computed twice, and once unproven.

For each technique the functions of ours that its golden adapters call are traced, and those that short runs of ``lit`` reach: its configs,
validated, tested and resumed; settings that no config has; the stages of its claim. Runs end as soon as nothing is missing.
"""

import contextlib
import importlib
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from test_catalogue import SHORTENED, TINY

import reached
from golden import GOLDEN_DIR, GoldenCase
from lit_methods.catalog import configs_folder, techniques
from lit_methods.claims.plan import QUICK_WORDS, stage_words
from lit_methods.claims.runner import CHILD, Runner
from lit_methods.claims.study import TRAINS, read_study
from lit_methods.cli.main import main
from lit_methods.sparse_autoencoders.abstopk.core import PROXIMAL
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
_COUPLED = '[{"consumer":"network.blocks.*.down","producers":["network.blocks.*.up","network.blocks.*.gate"]}]'
_RESNET = "--model.init_args.network CifarResNet18 --model.init_args.network.in_channels 1 --model.init_args.network.width_factor 0.0625"
_CUT = '"capacity":8,"window":8,"kernel":3,"local":2,"prefix":1'
_LONG_TASKS = {
    "ruler_niah": 2000, "ruler_vt": 2500, "ruler_cwe": 6000, "story_retrieval": 4000, "story_multihop": 2000, "story_filtering": 2000,
}  # fmt: skip
# settings of the public classes that no config and no claim has: slug -> words, one run each; the first config is used unless they name one
_SAE = "--model SparseAutoencoder --model.init_args.activation"
SETTINGS = {
    "abstopk": [
        "--model.init_args.per_batch true --model.init_args.normalize sample --model.init_args.dead_after 1",
        f'{_SAE} topk --model.init_args.settings {{"k":3}}',
        f'{_SAE} jumprelu --model.init_args.penalties {{"l0":0.01}}',
        *(f'{_SAE} proximal --model.init_args.settings {{"regulariser":"{name}","lambda_":0.1,"k":3}}' for name in PROXIMAL),
    ],
    "adawac": [f"--trainer.callbacks.mode {mode}" for mode in ("reweight-only", "pseudo")],
    "adele": ["--trainer.callbacks.rule slices --trainer.callbacks.common_epoch 1", "--trainer.callbacks.eval_interval 1"],
    "cirim": ["--model.init_args.consistency explicit"],
    "conr": ["--trainer.callbacks.variant dense"],
    "dass": ["--model.init_args.pretrain_steps 1 --model.init_args.prune_steps 1 --model.init_args.finetune_steps 1"],
    "interlcm": [f"--model.init_args.color_fix {fix}" for fix in ("wavelet", "adain")],
    "dsl_recommendation": ["--trainer.callbacks.interval 2"],
    "dsnot": [
        "--trainer.callbacks.at_step 1 --trainer.callbacks.initial sparsegpt",
        "--trainer.callbacks.at_step 1 --trainer.callbacks.pattern 2:4 --trainer.callbacks.initial magnitude",
        *(
            f'--trainer.callbacks=[{{"class_path":"lit_methods.callbacks.{name}","init_args":{{"at_step":0}}}}]'
            for name in ("Magnitude", "Wanda", "SparseGPT")
        ),
    ],
    "dloral": ["--model.init_args.color_fix adain"],
    "video_action_detection": ["--model.init_args.consistency bv+gv"],
    "cono": [f"--model.init_args.sampler.strategy {strategy}" for strategy in ("freenoise", "genl")],
    "gba": ["--config configs/gba_topk.yaml"],  # another activation: what a function names is looked up once for each
    "ict": ["--config configs/ct.yaml --model.init_args.metric l1"],
    "issp": ["--trainer.callbacks.pick min_2:4 --trainer.callbacks.prune_iters 4"],
    "masksparsity": ["--trainer.callbacks.criterion threshold", f"{_RESNET} --trainer.callbacks.criterion threshold"],
    "progressive_gradient_flow": [
        "--trainer.callbacks.recipe sdgf_stepwise --trainer.callbacks.n 2 --trainer.callbacks.m 4",
        "--trainer.callbacks.rate 0.5",
    ],
    "random_pruning": [f"--trainer.callbacks.method {method}" for method in ("snip", "grasp")],
    "random_search": ["--trainer.callbacks.space weight"],
    "rcm": [_WAN, "--config configs/rcm.yaml --model.init_args.consistency dcm --model.init_args.pretrain_iterations 0"],
    "s2ft": [f"--trainer.callbacks.u_ratio 0.05 --trainer.callbacks.couplings {_COUPLED}"],
    "sara": ["--trainer.callbacks.progressive_steps 2"],
    "sparse_retriever": [
        "--config configs/sparse_retriever_distill.yaml --model.init_args.loss margin_mse --model.init_args.in_batch_negatives false"
    ],
    "ssvi": ["--trainer.callbacks.interval 1 --trainer.callbacks.criterion SNR_exp_mean_abs"],
    "slct": ["--model.init_args.network test_reachability.NormedNetwork"],
    "sparsejepa": ["--model.init_args.mode penalty"],
    "sparse_model_soups": [
        "soup --soup greedy --candidates 2 --trainer.callbacks.dense_epochs 1 --trainer.callbacks.retrain_epochs 1 "
        "--trainer.callbacks.phases 1",
    ],
    "sparse_frontier": [
        *(
            f'--trainer.callbacks.init_args.method {{"class_path":"lit_methods.callbacks.{name}","init_args":{{{values}}}}}'
            for name, values in {
                "VerticalSlash": '"window":8',
                "FlexPrefill": '"alpha":0.5',
                "BlockSparse": '"sparsity":0.5,"block":4',
                "SnapKV": _CUT,
                "AdaSnapKV": _CUT,
            }.items()
        ),
        *(
            f"--data LongTasksDataModule --data.init_args.task {task} --data.init_args.length {length} --data.init_args.samples 2 "
            "--data.init_args.batch_size 1 --model.init_args.max_new_tokens 2 --model.init_args.config.vocab_size 256 "
            '--trainer.callbacks=[{"class_path":"lit_methods.callbacks.SparseAttentionCallback"}]'
            for task, length in _LONG_TASKS.items()
        ),
    ],
    "sparse_ift": [
        *(f"--trainer.callbacks.family {family} --trainer.callbacks.interval 2" for family in ("parallel", "factorized", "doped")),
        "--trainer.callbacks.anneal exponential --trainer.callbacks.interval 2 --trainer.callbacks.targets [layers.1]",
        "--trainer.callbacks.family doped --trainer.callbacks.fold_weight_decay true",
        f"{_RESNET} --trainer.callbacks.family parallel --trainer.callbacks.flops_tolerance null",
    ],
    "top_afa": ["--model.init_args.normalize sample", "--config configs/topk.yaml --model.init_args.activation batchtopk"],
}
# functions that no run can reach: name as in reached.py, without the line -> why
_GRADUAL = "no class prunes gradually; the golden kind training_flops has its formulas, and lit_methods.functional offers them"
EXCEPTIONS = {
    "callbacks/sparsity/flops.py gradual_training_flops": _GRADUAL,
    "callbacks/sparsity/schedules.py cubic_sparsity": _GRADUAL,
    **{
        f"lit_methods/sparse_autoencoders/abstopk/core.py {name}": "of what proximal_map makes smallest, in the golden kind prox"
        for name in ("proximal_objective", "_l0", "_l1", "_nothing")
    },
    **{
        f"lit_methods/tasks/language/answers.py {name}": "of squad_f1, whose documents are read from files; in the golden kind score"
        for name in ("word_overlap", "_words")
    },
    "lit_methods/inverse_problems/flair/core.py guided_velocity": "of SD3Flow, which needs diffusers; test_flair_technique.py compares it",
    "lit_methods/claims/verdict.py welch": "compares runs that have ended; the page of random search shows it",
    "lit_methods/consistency_models/metrics.py geman_mcclure": "compared with in the golden kind metric; lit_methods.functional offers it",
}


class NormedNetwork(torch.nn.Module):
    """Points (B, 2) with a layer norm, whose scale SLCT takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.SiLU(), torch.nn.Linear(8, 2))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, noise[:, None].to(x.dtype)], dim=1))


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
    number, made = itertools.count(), list[str]()

    def run(command: str, words: Iterable[str]) -> Callable[[], None]:
        def lit_in_a_new_folder() -> None:
            folder = root / str(next(number))
            lit([command, *words, "--run_root", str(folder)])
            made.extend(str(path) for path in folder.rglob("last.ckpt"))

        return lit_in_a_new_folder

    first = ["--config", f"configs/{entry.configs[0]}"]
    configs = [[*first, *SHORTENED.get(slug, "").split()], *(["--config", f"configs/{config}"] for config in entry.configs[1:])]
    checkpoints = []
    yield run("fit", [*configs[0], *fit])
    checkpoints.append(made[-1])
    for setting in SETTINGS.get(slug, ()):
        command, *words = setting.split() if setting.startswith("soup ") else ["fit", *setting.split()]
        yield run(command, [*([] if setting.startswith("--config") else first), *words, *fit])
    yield run("test", [*configs[0], *part, "--ckpt_path", checkpoints[0]])
    for config in configs[1:]:
        yield run("fit", [*config, *fit])
        checkpoints.append(made[-1])
    yield run("fit", [*configs[0], *fit, "--ckpt_path", checkpoints[0]])  # resumed
    for config, checkpoint in zip(configs, checkpoints, strict=True):
        for command in ("validate", "test"):
            yield run(command, [*config, *part, "--ckpt_path", checkpoint])
    study = read_study(configs_folder() / "claims" / f"{slug}.yaml")
    chains = [*study.arms.values(), *([*study.arms[report.arm], report.stage] for report in study.reports if report.stage)]
    done: dict[str, str] = {}
    for chain in chains:
        before = ""
        for stage in chain:
            cut = QUICK_WORDS if stage.command in TRAINS else part
            command, *words = [word.replace("{checkpoint}", before) for word in stage_words(stage, 0, study.seed_keys, cut)]
            place = " ".join([command, *words])
            if place not in done:
                yield run(command, words)
                done[place] = made[-1] if stage.command == "fit" else before
            before = done[place]


def without_line(name: str) -> str:
    path, _, rest = name.partition(":")
    return f"{path} {rest.partition(' ')[2]}"


ALL = [pytest.param(slug, marks=[] if slug == "tcm" else pytest.mark.thorough) for slug in sorted(techniques())]


@pytest.mark.usefixtures("forked_python")  # `lit soup` starts processes
@pytest.mark.parametrize("slug", ALL)
def test_what_the_golden_adapters_call_is_reached_by_a_run(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner.__init__, "__defaults__", ((sys.executable, *CHILD[1:]),))
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
