"""``lit doctor``: what is there, what is missing, the figures of a run; nothing is built for real, read or written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_methods import hub
from lit_methods.catalog import configs_folder
from lit_methods.cli.main import main
from lit_methods.datamodules.folders import COMMON


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(COMMON, raising=False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: pytest.fail("the hub was asked"))


def examined(*words: str, capsys: pytest.CaptureFixture[str], status: int | None = None) -> dict[str, Any]:
    """The diagnosis as a dictionary; the exit status is 1 where something is missing, and nothing is left in the folder."""
    before = sorted(os.listdir())
    found = main(["doctor", *words, "--json"])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found == (1 if said["missing"] else 0)
    assert status in (None, found), said["findings"]
    assert sorted(os.listdir()) == before, "something was written"
    return said


def states(said: dict[str, Any], what: str) -> list[tuple[str, str]]:
    return [(finding["state"], finding["said"]) for finding in said["findings"] if finding["what"] == what]


def test_a_config_with_built_in_data_is_all_there(capsys: pytest.CaptureFixture[str]) -> None:
    said = examined("configs/tcm.yaml", "--trainer.accelerator=cpu", "--trainer.max_steps=7", capsys=capsys, status=0)
    assert states(said, "data")[0][0] == "ok"
    assert said["total_steps"] == 7
    assert said["parameters"] == said["trained"] > 0
    assert said["memory"]["weights"] >= 4 * said["parameters"]
    assert said["memory"]["gradients"] == 4 * said["trained"]
    assert said["writes"].startswith("runs/tcm/<time>/")


def test_figures_are_those_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Adam keeps two moments; an epoch has as many steps as the loader has batches over all processes and accumulations."""
    words = ["--model", "lit_methods.ImageClassifier", "--model.network", "lit_methods.CifarResNet", "--model.network.depth", "20"]
    words += ["--model.optimizer", "adamw", "--data", "DigitsDataModule", "--data.batch_size", "16"]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "3"]
    one = examined(*words, capsys=capsys, status=0)
    assert one["memory"]["optimiser"] >= 2 * one["memory"]["gradients"]
    assert one["samples_per_step"] == 16
    assert one["total_steps"] == 3 * one["steps_per_epoch"]
    more = examined(*words, "--trainer.devices", "2", "--trainer.accumulate_grad_batches", "2", capsys=capsys, status=0)
    assert more["samples_per_step"] == 64
    assert more["steps_per_epoch"] == pytest.approx(one["steps_per_epoch"] / 4, abs=1)
    frozen = examined(*words, "--trainer.limit_train_batches", "5", capsys=capsys, status=0)
    assert frozen["steps_per_epoch"] == 5


def test_missing_data_weights_and_gpus_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = examined("configs/full/tcm_cub.yaml", capsys=capsys, status=1)
    assert "no images.txt: unpack CUB_200_2011" in states(said, "data")[0][1]
    assert states(said, "weights")[0][0] == "missing"
    assert "hf download" in states(said, "weights")[0][1]
    assert said["parameters"] == pytest.approx(21.9e6, rel=0.01)
    assert said["samples_per_step"] == said["recipe_samples"] == 32 * 4
    if not torch.cuda.is_available():
        assert states(said, "GPUs")[0][0] == "missing"
    elsewhere = examined("configs/full/tcm_cub.yaml", "--elsewhere", capsys=capsys, status=1)
    assert states(elsewhere, "GPUs")[0][0] == "unknown"


def test_a_fake_release_is_enough(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["fake", "configs/full/dsl_recommendation_neumf.yaml", "there"]) == 0
    capsys.readouterr()
    monkeypatch.setenv(COMMON, "there")
    said = examined("configs/full/dsl_recommendation_neumf.yaml", "--elsewhere", capsys=capsys, status=0)
    assert states(said, "data")[0][0] == "ok"
    assert said["epochs"] == 200
    assert said["total_steps"] == 200 * said["steps_per_epoch"]


def test_another_number_of_samples_than_the_recipes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "configs/full/ict_cifar10.yaml", "--elsewhere", "--trainer.devices=2"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "samples a step 256; the recipe has 1,024" in said
    assert "1024 in all" in said


def test_a_large_model_takes_no_memory_and_weights_are_not_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Four billion parameters, of which the teacher's are frozen; the file of weights is no file of weights."""
    weights = tmp_path / "teacher.pth"
    weights.write_bytes(b"no weights")
    words = ["configs/full/rcm_wan1b.yaml", "--elsewhere", f"--model.init_args.teacher_weights={weights}"]
    said = examined(*words, capsys=capsys, status=1)
    assert said["parameters"] > 4e9
    assert said["trained"] == pytest.approx(2 / 3 * said["parameters"], rel=0.01)
    assert [state for state, _ in states(said, "weights")] == ["ok"]


def test_files_of_weights_in_callbacks_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_pruning")
    said = examined("configs/full/masksparsity_cifar.yaml", "--elsewhere", capsys=capsys, status=1)
    assert any("masksparsity/global.ckpt: no such file" in words for _, words in states(said, "weights"))


def test_a_broken_root_is_told_by_its_first_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "CIFARDataModule", "there"]) == 0
    Path("there/cifar-10-batches-py/data_batch_3").unlink()
    capsys.readouterr()
    words = ["configs/full/masksparsity_cifar.yaml", "--elsewhere", "--data.init_args.root=there"]
    said = examined(*words, capsys=capsys, status=1)
    assert "data_batch_3" in states(said, "data")[0][1]


def test_what_a_run_prepares_itself_is_not_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """The statistics of latents are computed at the start of the run."""
    assert main(["fake", "LatentDataModule", "there", "num_val=2", "image_size=32"]) == 0
    capsys.readouterr()
    words = ["configs/slct.yaml", "--data=LatentDataModule", "--data.root=there", "--data.num_val=2", "--data.image_size=32"]
    assert "isn't there yet" in states(examined(*words, capsys=capsys), "data")[0][1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/full/tmc_cub.yaml"], "nearest: configs/full/tcm_cub.yaml"),
        (["--trainer.max_steps=3"], "lit doctor needs a config"),
        (["configs/tcm.yaml", "--trainer.max_stepps=3"], "max_steps"),
        (["configs/tcm.yaml", "--trainer.max_steps=some"], "max_steps"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


WITHOUT_END = {"cono_text_to_video", "dass_cifar_search"}  # nothing is trained; the search ends itself
NOT_COUNTED = {
    "cast_llama2_7b",
    "cir_uncertainty_fashion200k",
    "cir_uncertainty_fashioniq",
    "cir_uncertainty_shoes",
    "cono_text_to_video",
    "coprompt_eurosat",
    "coprompt_imagenet",
    "dloral_sd21",
    "dsnot_llama",
    "flair_sd3",
    "interlcm_faces",
    "maid_experts_kodak",
    "maid_mnist",
    "s2ft_llama3_8b",
    "sara_sd15",
    "slct_celebahq",
    "slct_celebahq_dit",
    "sparse_frontier_qwen",
    "sparse_retriever_msmarco",
    "sparse_retriever_pretrain",
    "sparsed_dream",
    "sparsed_llada",
    "supervised_dictionary_learning_mnist",
    "supervised_dictionary_learning_postings",
}  # built from their weights' folder, or when the data are there


@pytest.mark.thorough
@pytest.mark.parametrize("file", sorted((configs_folder() / "full").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_full_recipe_is_examined(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny release nothing but weights, disk and libraries can be missing, and the samples per step are the recipe's."""
    assert main(["fake", f"configs/full/{file.name}", "there"]) == 0
    capsys.readouterr()
    monkeypatch.setenv(COMMON, "there")
    said = examined(f"configs/full/{file.name}", "--trainer.devices=1", "--trainer.num_nodes=1", "--elsewhere", capsys=capsys)
    trainer = yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]
    missing = [(finding["what"], finding["said"]) for finding in said["findings"] if finding["state"] == "missing"]
    assert [one for one in missing if one[0] in ("data", "GPUs", "model")] == []
    processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    if file.stem.startswith(("supervised_dictionary_learning", "maid")):  # a step is the whole problem
        assert said["samples_per_step"] is said["recipe_samples"] is None
    else:
        assert said["samples_per_step"] * processes == said["recipe_samples"]
    assert (
        said["total_steps"] is not None or file.stem in WITHOUT_END or states(said, "libraries") or states(said, "data")[0][0] == "unknown"
    )
    assert (said["parameters"] or 0) > 1e4 or file.stem in NOT_COUNTED
