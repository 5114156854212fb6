"""Every technique of the catalogue, through its own configs: fit, resume in mid-epoch, validate, test, predict, two processes, export.

A technique that is added to the catalogue is tested here without anyone remembering to.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers import Killed, assert_state_dicts_equal, run_two_processes
from lit_methods.catalog import configs_folder, package_folder, public_names, techniques
from lit_methods.cli.main import main
from lit_methods.runs.checkpoints import read_state_dict

LIMITS = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
SHORT = [word for name, value in LIMITS.items() for word in (f"--trainer.{name}", value)]
CONFIGS = [  # further configs of a technique take minutes: `make test-slow`
    pytest.param(config, id=Path(config).stem, marks=[pytest.mark.slow] if config != entry.configs[0] else [])
    for entry in techniques().values()
    for config in entry.configs
]
SLUGS = sorted(techniques())


@pytest.fixture(autouse=True)
def one_thread():
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


@pytest.mark.parametrize("config", CONFIGS)
def test_config_trains_and_a_killed_run_ends_bit_equal(config, tmp_path):
    file = ["--config", f"configs/{config}", *SHORT]
    lit("fit", *file, "--run_root", tmp_path / "whole")
    run = only_run(tmp_path / "whole")
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.html", "checkpoints/last.ckpt"):
        assert (run / name).is_file(), f"the run folder lacks {name}"
    kill = ["--trainer.callbacks+=helpers.KillAt", "--trainer.callbacks.step", 1, "--trainer.callbacks.path", tmp_path / "killed.ckpt"]
    with pytest.raises(Killed):
        lit("fit", *file, "--run_root", tmp_path / "killed", *kill)
    lit("fit", *file, "--run_root", tmp_path / "resumed", "--ckpt_path", tmp_path / "killed.ckpt")
    resumed = read_state_dict(only_run(tmp_path / "resumed") / "checkpoints" / "last.ckpt")
    assert_state_dicts_equal(resumed, read_state_dict(run / "checkpoints" / "last.ckpt"))
    assert any(not torch.equal(resumed[name], value) for name, value in read_state_dict(tmp_path / "killed.ckpt").items()), (
        "the last step did nothing"
    )


@pytest.mark.parametrize("slug", SLUGS)
def test_technique_evaluates_predicts_and_exports(slug, tmp_path):
    config = techniques()[slug].configs[0]
    limits = ["--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1, "--trainer.limit_predict_batches", 1]
    file = ["--config", f"configs/{config}", *limits]
    lit("fit", *file, "--run_root", tmp_path / "fit", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1)
    checkpoint = only_run(tmp_path / "fit") / "checkpoints" / "last.ckpt"
    for command in ("validate", "test", "predict"):
        lit(command, *file, "--ckpt_path", checkpoint, "--run_root", tmp_path / command)
    lit("export", checkpoint, tmp_path / "weights.pt")
    exported = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_state_dicts_equal(exported, read_state_dict(checkpoint))


def two_process_words(slug: str, root: Path) -> list[str]:
    words = ["fit", "--config", f"configs/{techniques()[slug].configs[0]}", *SHORT, "--run_root", root, "--trainer.accelerator", "cpu"]
    words += ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.init_args.num_workers", 0]
    return [str(word) for word in words]


def fit_in_this_process(words: list[str]) -> int:
    before = Path.cwd()
    os.chdir(Path(__file__).parents[1])
    try:
        return main(words)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("slug", SLUGS)
def test_technique_runs_in_two_processes(slug, tmp_path):
    assert run_two_processes(fit_in_this_process, two_process_words(slug, tmp_path)) == [0, 0]
    assert all(value.isfinite().all() for value in read_state_dict(only_run(tmp_path) / "checkpoints" / "last.ckpt").values())


def test_the_command_starts_the_second_process(tmp_path):
    command = [sys.executable, "-m", "lit_methods", *two_process_words("random_pruning", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
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
