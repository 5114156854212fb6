"""Every technique of the catalogue, through its own configs: fit, resume, validate, test, predict, export, what is logged, two processes.

A technique that is added to the catalogue is tested here without anyone remembering to.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers import HANGS, Killed, advice_on_figures, assert_state_dicts_equal, run_two_processes
from lit_methods.catalog import configs_folder, package_folder, public_names, techniques
from lit_methods.cli.main import main
from lit_methods.panels import Curve
from lit_methods.runs.checkpoints import read_state_dict
from wandb_log import read_run

SHORT = [
    "--trainer.max_epochs",
    "1",
    "--trainer.limit_train_batches",
    "2",
    "--trainer.limit_val_batches",
    "1",
    "--trainer.log_every_n_steps",
    "1",
]
SLUGS = sorted(techniques())
FURTHER = [config for entry in techniques().values() for config in entry.configs[1:]]
# two epochs of four batches
TINY = "--trainer.max_epochs 2 --trainer.limit_train_batches 4 --trainer.limit_val_batches 1 --trainer.log_every_n_steps 2 "
TINY += "--trainer.check_val_every_n_epoch 1 --trainer.val_check_interval 1.0 --trainer.accelerator cpu --trainer.enable_progress_bar false"
# less of what would cost seconds; `test_technique_runs_in_two_processes` takes the configs as they are
SMALLER = {
    "superflow": "--data.init_args.batch_size 1 --data.init_args.cameras 1 --data.init_args.image_size [32,64]",
    "adele": "--data.init_args.batch_size 3 --data.init_args.num_train 30 --data.init_args.num_val 20",
    "cono": "--model.init_args.sampler.steps 4 --model.init_args.sampler.guided_until 1 --data.init_args.batch_size 2 "
    "--data.init_args.num_val 4 --data.init_args.val_batch_size 2",
    "consistencydet": "--data.init_args.num_train 64 --data.init_args.num_val 8 --data.init_args.num_test 8 "
    "--data.init_args.eval_batch_size 4 --model.init_args.eval_steps [1,2]",
    "cotap": "--model.init_args.encoder.init_args.depth 2 --data.init_args.batch_size 4 --data.init_args.num_train 60 "
    "--data.init_args.num_probe 60 --data.init_args.num_val 30",
    "dass": "--model.init_args.network.init_args.channels 2 --model.init_args.network.init_args.nodes 1 --data.init_args.batch_size 8",
    "flair": "--model.init_args.settings.steps 4 --model.init_args.settings.data_steps 2 --model.init_args.val_images 2 "
    "--model.init_args.calibration_times 3 --data.init_args.batch_size 16 --data.init_args.eval_batch_size 4",
    "sae_evals": "--model.init_args.features 64 --data.init_args.num_val 200",
}
SAVED_BEHIND = 5  # batches: in the middle of the second epoch
# what eight steps are too few for: slug or config -> further words; and a panel that needs another data set beside the config's
SHORTENED = {
    "continuous_ap": "--data.init_args.batch_size 100",  # an epoch of the config is one batch
    "adele": "--trainer.callbacks.common_epoch 1 --trainer.callbacks.confidence 0",
    "gba": "--trainer.callbacks.every_n_steps 2",
    "dsnot": "--trainer.callbacks.at_step 4",
    "sparse_model_soups": "--trainer.callbacks.dense_epochs 1 --trainer.callbacks.retrain_epochs 1",
    "issp": "--trainer.callbacks.prune_iters 4",
    "interlcm": "--model.init_args.gan_start 2",
    "sam3d_weak": "--data.init_args.batch_size 1",  # an epoch of the config is three batches
    "rcm": "--model.init_args.pretrain_iterations 1 --model.init_args.tangent_warmup 2",
    "ddc_fewshot": "--model.init_args.source_steps 1 --model.init_args.fusion_steps 1",
    "sparseland": "--trainer.callbacks.interval 2",
    "ssvi": "--trainer.callbacks.interval 2",
}
NEEDS_MORE = {"Detection of unknown inputs (AUROC)", "segmentation/volumes"}  # whole volumes are for `lit test`


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of several threads needn't be bit-equal from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lit(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def only_run(root: Path) -> Path:
    (run,) = [folder for name in root.iterdir() for folder in name.iterdir()]
    return run


# ---- one run of each technique ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyRun:
    """A finished run of a technique's first config.

    Attributes:
        slug: The technique.
        words: Words of ``lit`` for its config, without limits.
        folder: The run's folder.
        saved: Checkpoint of the middle of the run.
        root: An empty folder for what the tests of the run write.
    """

    slug: str
    words: list[str]
    folder: Path
    saved: Path
    root: Path

    @property
    def last(self) -> Path:
        """Checkpoint of the end."""
        return self.folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def tiny_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Eight steps, logged by W&B offline; all that follows takes its checkpoints."""
    slug, root = request.param, tmp_path_factory.mktemp("tiny")
    words = ["--config", f"configs/{techniques()[slug].configs[0]}"]
    save = [
        "--trainer.callbacks+=helpers.SaveAt",
        "--trainer.callbacks.batch",
        SAVED_BEHIND,
        "--trainer.callbacks.path",
        root / "saved.ckpt",
    ]
    shortened = [*SHORTENED.get(slug, "").split(), *SMALLER.get(slug, "").split()]
    lit("fit", *words, "--config", "configs/logger/wandb.yaml", *TINY.split(), *shortened, *save, "--run_root", root / "fit")
    return TinyRun(slug, [*words, *shortened], only_run(root / "fit"), root / "saved.ckpt", root)


FIRST_OF_EACH_FORM = {entry.form: slug for slug, entry in reversed(techniques().items())}.values()


def of_each_form() -> list[Any]:
    """Parameters of a test that costs a start of the command: one technique of each form, and the others for `make test-all`."""
    return [pytest.param(slug, marks=[] if slug in FIRST_OF_EACH_FORM else pytest.mark.thorough) for slug in SLUGS]


each_technique = pytest.mark.parametrize("tiny_run", SLUGS, indirect=True)


def assert_resumes(words: list[object], whole: Path, saved: Path, root: Path) -> None:
    """A new run from ``saved`` ends with the weights of ``whole``, which aren't those of ``saved``."""
    lit("fit", *words, "--run_root", root, "--ckpt_path", saved)
    resumed = read_state_dict(only_run(root) / "checkpoints" / "last.ckpt")
    assert_state_dicts_equal(resumed, read_state_dict(whole))
    assert any(not torch.equal(resumed[name], value) for name, value in read_state_dict(saved).items()), "the last steps did nothing"


@each_technique
def test_a_run_leaves_a_folder_with_everything(tiny_run: TinyRun) -> None:
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.html", "checkpoints/last.ckpt"):
        assert (tiny_run.folder / name).is_file(), f"the run folder lacks {name}"


@each_technique
def test_a_run_resumed_in_mid_epoch_ends_bit_equal(tiny_run: TinyRun) -> None:
    assert_resumes([*tiny_run.words, *TINY.split()], tiny_run.last, tiny_run.saved, tiny_run.root / "resumed")


def evaluate(command: str, run: TinyRun, root: Path) -> None:
    lit(command, *run.words, f"--trainer.limit_{command.removesuffix('idate')}_batches", 1, "--ckpt_path", run.last, "--run_root", root)


@pytest.mark.parametrize("tiny_run", of_each_form(), indirect=True)
def test_technique_validates(tiny_run: TinyRun, tmp_path: Path) -> None:
    evaluate("validate", tiny_run, tmp_path)


@each_technique
def test_technique_evaluates_predicts_and_exports(tiny_run: TinyRun, tmp_path: Path) -> None:
    for command in ("test", "predict"):
        evaluate(command, tiny_run, tmp_path / command)
    lit("export", tiny_run.last, tmp_path / "weights.pt")
    exported = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_state_dicts_equal(exported, read_state_dict(tiny_run.last))


@pytest.mark.slow
@pytest.mark.parametrize("config", FURTHER, ids=lambda config: Path(config).stem)
def test_a_further_config_trains_and_a_killed_run_ends_bit_equal(config: str, tmp_path: Path) -> None:
    file = ["--config", f"configs/{config}", *SHORT, *SHORTENED.get(Path(config).stem, "").split()]
    lit("fit", *file, "--run_root", tmp_path / "whole")
    kill = ["--trainer.callbacks+=helpers.KillAt", "--trainer.callbacks.step", 1, "--trainer.callbacks.path", tmp_path / "killed.ckpt"]
    with pytest.raises(Killed):
        lit("fit", *file, "--run_root", tmp_path / "killed", *kill)
    last = only_run(tmp_path / "whole") / "checkpoints" / "last.ckpt"
    assert_resumes(file, last, tmp_path / "killed.ckpt", tmp_path / "resumed")


def shown_by_run(config: str) -> tuple[str, ...]:
    """Short names of the classes in a config of the catalogue, the model's first."""
    from lit_methods.catalog import configs_folder

    return tuple(re.findall(r"class_path:\s*(?:[\w.]*\.)?(\w+)", (configs_folder() / config).read_text(encoding="utf-8")))


@each_technique
def test_a_run_logs_what_the_workspace_shows(tiny_run: TinyRun) -> None:
    """W&B's log of the run against the panels of the technique's workspace."""
    pytest.importorskip("wandb_workspaces")
    from lit_methods.reports.workspace import declared_panels, workspace

    slug = tiny_run.slug
    technique = techniques()[slug]
    config = technique.configs[0]
    run = read_run(tiny_run.folder)
    assert run.exit_code == 0
    assert slug in run.tags
    assert {"commit", "branch", "dirty"} <= set(run.config.get("git", {})) or not Path(".git").exists()
    assert run.config["seed_everything"] is not None
    space = workspace(technique, "somebody", "project")
    used = set(shown_by_run(config))
    sections = [section for section in space.sections if section.name in used]
    assert sections, f"{config} uses none of {technique.classes}"
    for section in sections:
        for panel in section.panels:
            names = getattr(panel, "media_keys", None) or getattr(panel, "y", None) or [getattr(panel, "table_name", None)]
            if {getattr(panel, "title", ""), names[0]} & NEEDS_MORE:
                continue
            if pattern := getattr(panel, "metric_regex", None):
                assert any(re.search(pattern, name) for name in run.names), f"{panel.title}: nothing like {pattern} among {run.names}"
            elif names[0]:
                assert set(names) <= set(run.names), f"{names} isn't in {run.names}"
    declared = [panel for own in declared_panels(technique).values() for panel in own]
    keys = [panel.key for panel in declared if not isinstance(panel, Curve) and panel.key in run.names]
    ends = [3, 7]  # the last step of each of two epochs
    for key in keys:
        assert run.steps(key) == ends, f"{key} belongs to the ends of validation"
        for value in run.values(key):
            assert "path" not in value or (run.folder / "files" / value["path"]).is_file()
    for name in run.names:
        if "val_" in name:
            assert run.steps(name) == ends, f"{name} belongs to the ends of validation"
    rows = [row for row in run.rows if set(row) - {"_step", "_runtime", "_timestamp"}]
    updates = len(run.steps("sparsity/updates")) if "sparsity/updates" in run.names else 0  # the sparsity report logs at mask updates
    assert len(rows) <= 4 + 3 * len(ends) + updates, "more rows than log steps, epoch ends, validations, media and mask updates"
    assert max(len(row) for row in rows) < 60, "a row per step is no place for a value per parameter or class"
    for curve in (panel for panel in declared if isinstance(panel, Curve)):
        for name in curve.select(run.names):
            defined = run.metrics[name]
            assert defined.step_metric == "trainer/global_step", name
            assert defined.summary.last, name
            assert (defined.summary.min, defined.summary.max) == (curve.goal == "min", curve.goal == "max"), name
    metrics = tiny_run.folder / "metrics.jsonl"
    own = {name for line in metrics.read_text().splitlines() for name in json.loads(line)["metrics"]}
    media = {name for name in run.names if any(isinstance(value, dict) for value in run.values(name))}
    assert own == set(run.names) - media - {"trainer/global_step", "epoch"}  # the same names as in the report


# ---- two processes ---------------------------------------------------------------------------------------------------------------------


def two_process_words(slug: str, root: Path) -> list[str]:
    words = ["fit", "--config", f"configs/{techniques()[slug].configs[0]}", *SHORT, "--run_root", root, "--trainer.accelerator", "cpu"]
    words += ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.init_args.num_workers", 0]
    return [str(word) for word in words]


def fit_in_this_process(words: list[str]) -> tuple[int, list[str]]:
    """Exit code, and what Lightning advises about figures of an epoch."""
    before = Path.cwd()
    os.chdir(Path(__file__).parents[1])
    try:
        with advice_on_figures() as advice:
            code = main(words)
        return code, advice
    finally:
        os.chdir(before)


@pytest.mark.parametrize("slug", of_each_form())
def test_technique_runs_in_two_processes(slug, tmp_path):
    assert run_two_processes(fit_in_this_process, two_process_words(slug, tmp_path)) == [(0, []), (0, [])]
    assert all(value.isfinite().all() for value in read_state_dict(only_run(tmp_path) / "checkpoints" / "last.ckpt").values())


@pytest.mark.thorough
def test_the_command_starts_the_second_process(tmp_path):
    command = [sys.executable, "-m", "lit_methods", *two_process_words("random_pruning", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "MEMBER: 2/2" in done.stdout + done.stderr
    assert (only_run(tmp_path) / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("slug", SLUGS)
def test_catalogue_entry_is_complete_and_true(slug):
    entry = techniques()[slug]
    module, _, name = entry.classes[0].rpartition(".")
    main_class = getattr(importlib.import_module(module), name)
    declared = importlib.import_module(main_class.__module__).TECHNIQUE
    assert declared == entry, "the entry read from the source is the object beside the class"
    for dotted in entry.classes:
        assert dotted.rpartition(".")[2] in public_names(), f"{dotted} has no line in a stub"
    tests = Path(__file__).parent
    assert (tests / "golden" / f"test_{slug}.py").is_file()
    kinds = {path.stem.rpartition("-")[0] for path in (tests / "golden" / "data" / slug).glob("*.npz")}
    assert kinds == set(entry.golden)
    if not entry.draft:
        assert (configs_folder() / "claims" / f"{slug}.yaml").is_file()
        assert (tests.parent / "docs" / "techniques" / f"{slug}.md").is_file()
        assert (tests / "trajectory" / f"test_{slug}.py").is_file()
        assert any(slug in path.stem for path in (configs_folder() / "full").glob("*.yaml")), "no full-scale recipe"
    for config in entry.configs:
        assert yaml.safe_load((configs_folder() / config).read_text()), config


def test_every_public_name_resolves():
    for name, package in public_names().items():
        assert getattr(importlib.import_module(package), name).__name__ == name


def test_listing_reads_the_source_only():
    code = (
        "import lit_methods.catalog as c, sys; c.techniques(); c.public_names(); print('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
    assert package_folder("lit_methods.callbacks").is_dir()
