"""Names and types choose; a choice of nothing is explained."""

import pytest
import torch
from lightning.pytorch.demos.transformer import Transformer
from torch import nn

from helpers import compiled_classifier, small_network
from lit_methods.callbacks.targets import plain_module, select_modules


def test_patterns_and_order() -> None:
    root = nn.ModuleDict({"backbone": small_network(), "head": nn.Linear(4, 2)})
    assert list(select_modules(root, ["head", "backbone.[05]"])) == ["backbone.0", "backbone.5", "head"]
    assert list(select_modules(root, ["back*.7"])) == ["backbone.7"]
    assert select_modules(root, ["head"])["head"] is root["head"]
    assert "" not in select_modules(root, ["*"])


def test_types_alone_and_with_patterns() -> None:
    root = nn.ModuleDict({"backbone": small_network(), "head": nn.Linear(4, 2)})
    assert list(select_modules(root, [], (nn.Linear,))) == ["backbone.5", "backbone.7", "head"]
    assert list(select_modules(root, ["backbone.*"], (nn.Linear, nn.Conv2d))) == ["backbone.0", "backbone.5", "backbone.7"]


def test_a_pattern_without_match_lists_the_nearest_names() -> None:
    message = r"targets\[1\]='decodr' matches no submodule of Transformer; nearest of \d+ candidates: decoder \(Linear\)"
    with pytest.raises(ValueError, match=message):
        select_modules(Transformer(10), ["embedding", "decodr"])
    with pytest.raises(ValueError, match=r"'5' matches no submodule of type Conv2d.*1 candidates: 0 \(Conv2d\)"):
        select_modules(small_network(), ["5"], (nn.Conv2d,))


def test_other_empty_choices() -> None:
    with pytest.raises(ValueError, match="has no submodule of type LSTM"):
        select_modules(small_network(), [], (nn.LSTM,))
    with pytest.raises(ValueError, match="nothing is chosen"):
        select_modules(small_network(), [])
    with pytest.raises(ValueError, match=r"give a list of patterns, \['head'\]"):
        select_modules(small_network(), "head")
    with pytest.raises(ValueError, match="no submodules at all"):
        select_modules(nn.ReLU(), ["x"])


def test_sees_through_compile() -> None:
    root = compiled_classifier()
    chosen = select_modules(root, ["network", "network.0"])
    assert list(chosen) == ["network", "network.0"]
    assert chosen["network"] is root.network  # the compiled one: its hooks run outside the compiled code
    assert isinstance(plain_module(chosen["network"]), nn.Sequential)
    assert isinstance(chosen["network.0"], nn.Conv2d)
    assert list(select_modules(root, [], (nn.Sequential,))) == ["network"]
    assert list(select_modules(torch.compile(small_network(), backend="eager"), ["0"])) == ["0"]


def test_sees_through_data_parallel() -> None:
    assert list(select_modules(nn.DataParallel(small_network()), ["0"])) == ["0"]
