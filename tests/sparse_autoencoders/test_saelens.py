"""sae-lens's format without sae-lens: round trips, what has no counterpart, damaged folders. tests/neighbours/ has sae-lens itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny_trainer
from lit_methods import SparseAutoencoder
from lit_methods.cli.commands import export
from lit_methods.datamodules.loaders import make_loader
from lit_methods.errors import CommandError
from lit_methods.sparse_autoencoders.saelens import CONFIG, WEIGHTS, from_checkpoint, load_saelens, save_saelens

WIDTH, FEATURES = 6, 20


def made(**arguments: Any) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = SparseAutoencoder(WIDTH, FEATURES, **({"settings": {"k": 3}} | arguments))
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    return sae


def changed(folder: Path, **fields: Any) -> Path:
    """A saved autoencoder whose config has other fields."""
    save_saelens(made(), folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"activation": "abstopk"},
        {"activation": "relu", "settings": None, "tied": True},
        {"activation": "jumprelu", "settings": None, "centre": False},
        {"activation": "gated", "settings": {"rectified": True}, "normalize": "sample"},
    ],
    ids=lambda arguments: arguments.get("activation", "topk"),
)
def test_what_is_saved_is_loaded(tmp_path, arguments):
    sae, x = made(**arguments), torch.randn(30, WIDTH)
    loaded = load_saelens(save_saelens(sae, tmp_path / "new" / "sae"))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-6)
    assert loaded.renormalize == "none", "rows that have other norms keep them"


def test_unit_rows_stay_so_in_training(tmp_path):
    assert load_saelens(save_saelens(SparseAutoencoder(WIDTH, FEATURES, settings={"k": 3}), tmp_path / "sae")).renormalize == "before"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": "batchtopk"}, "'batchtopk' can't be saved in sae-lens's format: it chooses among the whole batch"),
        ({"activation": "abstopk", "settings": {"k": 3, "per_batch": True}}, "'abstopk' .*per_batch"),
        ({"activation": "gated", "settings": None}, r"settings: \{rectified: true\}"),
        ({"activation": "torch.nn.functional.silu", "settings": None}, "silu' can't be saved .* no such activation; it takes relu"),
    ],
)
def test_what_sae_lens_has_not_is_refused(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        save_saelens(made(**arguments), tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_bias_that_makes_codes_below_zero_is_refused(tmp_path):
    sae = made(activation="gba", settings=None)
    sae.encoder_bias.fill_(0.1)
    with pytest.raises(ValueError, match="encoder bias above 0 has codes below 0"):
        save_saelens(sae, tmp_path / "sae")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="isn't empty: give a new folder"):
        save_saelens(made(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architecture": "temporal"}, "of architecture 'temporal': those that are read here are standard, topk, abstopk, jumprelu, gated"),
        ({"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu'"),
        ({"k": None}, "k is None, expected"),
        ({"reshape_activations": "hook_z"}, "'hook_z'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening': what is read here"),
        ({"d_sae": 21}, r"W_dec is \(20, 6\), expected \(21, 6\)"),
        ({"d_in": "six"}, "no d_in and d_sae"),
        ({"architecture": "gated"}, r"b_enc is \(20,\), expected none, b_gate is missing, expected \(20,\)"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_a_folder_of_something_else_is_refused_by_name(tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        load_saelens(changed(tmp_path / "sae", **fields))


def test_damaged_folders_are_named(tmp_path):
    folder = save_saelens(made(), tmp_path / "sae")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors can't be read .*truncated"):
        load_saelens(folder)
    (folder / WEIGHTS).write_bytes(whole)
    (folder / CONFIG).write_text("[1]")
    with pytest.raises(ValueError, match=r"cfg\.json can't be read"):
        load_saelens(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no cfg\.json"):
        load_saelens(folder)


def test_configs_from_before_version_six_are_read(tmp_path):
    sae, x = made(), torch.randn(9, WIDTH)
    folder = changed(tmp_path / "sae", architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    torch.testing.assert_close(load_saelens(folder).encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)


def test_features_that_are_chosen_by_the_norm_of_their_direction_are_folded(tmp_path):
    folder = changed(tmp_path / "sae", rescale_acts_by_decoder_norm=True)
    sae, x, weights = load_saelens(folder), torch.randn(9, WIDTH), load_file(folder / WEIGHTS)
    norms = weights["W_dec"].norm(dim=1)
    u = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]) * norms
    kept = u.topk(3, dim=1)
    code = torch.zeros_like(u).scatter(1, kept.indices, kept.values.relu())
    torch.testing.assert_close(sae.encode(x), code, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), (code / norms) @ weights["W_dec"] + weights["b_dec"], rtol=1e-5, atol=1e-5)
    assert sae.renormalize == "before"


def test_weights_in_half_precision_are_read_in_float32(tmp_path):
    folder = save_saelens(made(), tmp_path / "sae")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert load_saelens(folder).decoder.dtype == torch.float32


def test_a_checkpoint_is_exported_by_the_command(tmp_path, capsys):
    sae, x = made(activation="abstopk"), torch.randn(20, WIDTH)
    loader = make_loader([{"activation": row} for row in x], 10, shuffle=False, seed=0, with_epoch=False)  # type: ignore[arg-type]
    trainer = tiny_trainer(max_steps=1)
    trainer.fit(sae, train_dataloaders=loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    words = [str(tmp_path / "last.ckpt"), str(tmp_path / "sae"), "--format", "sae-lens"]
    assert export(words) == 0
    assert "SAE.load_from_disk" in capsys.readouterr().out
    torch.testing.assert_close(load_saelens(tmp_path / "sae").encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(CommandError, match="isn't empty"):
        export(words)
    with pytest.raises(CommandError, match="give weights, folder, sae-lens"):
        export([*words[:-1], "other"])
    torch.save({"state_dict": {"weight": x}}, tmp_path / "other.ckpt")
    with pytest.raises(CommandError, match="is no checkpoint of a SparseAutoencoder: its weights are weight"):
        export([str(tmp_path / "other.ckpt"), str(tmp_path / "new"), "--format", "sae-lens"])


@pytest.mark.parametrize(
    "named",
    [
        {"activation": "evil_sae.function"},
        {"penalties": {"evil_sae.function": 1.0}},
        {"_class_path": "evil_sae.Autoencoder", "_instantiator": "evil_sae.build"},
        {"_class_path": "lit_methods.ImageClassifier"},
    ],
    ids=str,
)
def test_nothing_that_a_checkpoint_names_is_imported(tmp_path, monkeypatch, named):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_sae.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    sae = made()
    content = {"state_dict": sae.state_dict(), "hyper_parameters": dict(sae.hparams) | named}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"evil_sae|ImageClassifier"):
        from_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()
    content["hyper_parameters"] = dict(sae.hparams) | {"_class_path": "lit_methods.SparseAutoencoder", "_instantiator": "evil_sae.build"}
    torch.save(content, tmp_path / "last.ckpt")
    assert torch.equal(from_checkpoint(tmp_path / "last.ckpt").decoder, sae.decoder)
    assert not (tmp_path / "ran").exists()
