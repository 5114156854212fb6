"""Checkpoints of compiled networks, in exports and as pretrained weights."""

import importlib

import pytest
import torch
from torch import nn

from lit_methods import EPGFinetune, ImageClassifier, PixelViTDecoder, PixelViTEncoder
from lit_methods.cli.commands import export
from lit_methods.runs.checkpoints import PrefixError, load_into, read_state_dict


def network(seed: int = 0, compiled: str = "nothing") -> nn.Module:
    """Two linear layers; compiled as a whole, in part, or nested."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    if compiled in ("part", "nested"):
        net[0] = torch.compile(net[0], backend="eager")
    return torch.compile(net, backend="eager") if compiled in ("whole", "nested") else net  # type: ignore[return-value]


COMPILED = ("nothing", "whole", "part", "nested")
NAMES = list(network().state_dict())


def checkpoint(path, compiled):
    holder = nn.Module()
    holder.network = network(1, compiled)
    torch.save({"state_dict": holder.state_dict()}, path)
    return path


@pytest.mark.parametrize("compiled", COMPILED)
def test_an_export_has_the_names_of_the_network_as_it_was_written(tmp_path, compiled, capsys):
    path = checkpoint(tmp_path / "a.ckpt", compiled)
    assert list(read_state_dict(path)) == [f"network.{name}" for name in NAMES]
    assert export([str(path), str(tmp_path / "out.pt"), "--prefix", "network."]) == 0
    assert list(torch.load(tmp_path / "out.pt")) == NAMES


def test_a_prefix_with_the_compiled_name_still_finds_the_weights(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", "whole")
    assert list(read_state_dict(path, "network._orig_mod.")) == NAMES
    with pytest.raises(PrefixError, match="it has network"):
        read_state_dict(path, "other.")


@pytest.mark.parametrize("saved", COMPILED)
@pytest.mark.parametrize("needed", COMPILED)
def test_weights_go_from_any_form_into_any(tmp_path, saved, needed):
    module, source = network(0, needed), network(1)
    load_into(module, checkpoint(tmp_path / "a.ckpt", saved), "network.")
    for ours, theirs in zip(module.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_architecture_is_still_refused(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", "whole")
    with pytest.raises(ValueError, match=r"another architecture than OptimizedModule.*1 missing in the file"):
        load_into(torch.compile(nn.Sequential(*network(), nn.PReLU()), backend="eager"), path, "network.")


def test_pretrained_of_a_classifier_takes_a_compiled_run(tmp_path):
    module = ImageClassifier(network(0, "whole"), num_classes=2, pretrained=checkpoint(tmp_path / "a.ckpt", "part"))
    assert torch.equal(module.network.state_dict()["_orig_mod.1.weight"], network(1)[1].weight)


def test_the_encoder_of_a_compiled_first_stage_is_found(tmp_path):
    def encoder() -> PixelViTEncoder:
        return PixelViTEncoder(image_size=8, patch_size=4, in_channels=3, width=16, depth=1, heads=2)

    stage1, stage2 = encoder(), encoder()
    holder = nn.Module()
    holder.encoder = torch.compile(stage1, backend="eager")
    torch.save({"state_dict": holder.state_dict()}, tmp_path / "stage1.ckpt")
    decoder = PixelViTDecoder(image_size=8, patch_size=4, width=16, encoder_width=16, depth=1, heads=2)
    module = EPGFinetune(torch.compile(stage2, backend="eager"), decoder, encoder_ckpt=str(tmp_path / "stage1.ckpt"))
    module.setup("fit")
    for ours, theirs in zip(stage2.state_dict().values(), stage1.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_places_of_0_1_read_compiled_checkpoints_too(tmp_path):
    commands, old = importlib.import_module("lit_methods.cli.commands"), importlib.import_module("lit_methods.checkpoint")
    path = checkpoint(tmp_path / "a.ckpt", "nested")
    assert list(commands.read_state_dict(path, "network.")) == NAMES
    net = network()
    old.load_into(net, path, "network.")
    assert torch.equal(net[1].weight, network(1)[1].weight)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = commands.nothing
