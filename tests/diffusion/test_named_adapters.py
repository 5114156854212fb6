"""Adapters with names: what each adds, what learns, merged and as files; against peft where it is installed."""

import copy

import pytest
import torch
from torch import nn

from lit_methods.diffusion import lora


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(1), nn.Linear(6 * 16, 5)).double()


def adapted(filled: bool = True) -> nn.Sequential:
    model = small()
    lora.add_adapters(model, ["*"], {"quality": 2, "consistency": 3}, alpha=6.0)
    if filled:
        for name in ("quality", "consistency"):
            for parameter in lora.adapter_parameters(model, name):
                nn.init.normal_(parameter)
    return model


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_new_adapters_change_nothing_and_filled_ones_are_the_sum_of_their_products():
    assert torch.equal(adapted(filled=False)(X), small()(X))
    model, plain = adapted(), small()
    with torch.no_grad():
        for name, layer in lora.adapter_layers(model):
            a, b = ({k: getattr(layer, part)[k].weight.flatten(1) for k in layer.scales} for part in ("lora_A", "lora_B"))
            weight = plain.get_submodule(name).weight
            weight += (6 / 2 * b["quality"] @ a["quality"] + 6 / 3 * b["consistency"] @ a["consistency"]).view_as(weight)
    torch.testing.assert_close(model(X), plain(X))


def test_merged_equals_unmerged_and_comes_apart_bit_for_bit():
    model, before = adapted(), adapted().state_dict()
    unmerged = model(X)
    lora.merge(model)
    lora.merge(model)
    torch.testing.assert_close(model(X), unmerged)
    with pytest.raises(ValueError, match="call unmerge first"):
        lora.weigh_adapters(model, {"quality": 0.0})
    lora.unmerge(model)
    assert torch.equal(model(X), unmerged)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lora.fuse(model)
    torch.testing.assert_close(model(X), unmerged)
    assert set(model.state_dict()) == set(small().state_dict())


def test_switching_and_weighing():
    model = adapted()
    both = model(X)
    with lora.adapters_off(model):
        assert torch.equal(model(X), small()(X))
    assert torch.equal(model(X), both)
    lora.weigh_adapters(model, {"quality": 0.0})
    assert not torch.equal(model(X), both)
    lora.merge(model)
    one = model(X)
    lora.unmerge(model)
    torch.testing.assert_close(model(X), one)


def test_one_learns_and_the_other_works():
    model = adapted()
    lora.train_adapters(model, ["quality"])
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in lora.adapter_parameters(model, "quality"))
    assert all(p.grad is None for p in lora.adapter_parameters(model, "consistency"))
    assert all(not layer.base_layer.weight.requires_grad for _, layer in lora.adapter_layers(model))


def test_files_hold_what_was_asked_for_and_another_rank_is_told():
    model, other = adapted(), adapted(filled=False)
    state = {name: value.clone() for name, value in lora.adapter_state(model, ["quality"]).items()}
    assert sorted(state) == sorted(f"{k}.lora_{p}.quality.weight" for k in "03" for p in "AB")
    lora.load_adapters(other, state)
    lora.weigh_adapters(model, {"consistency": 0.0})
    torch.testing.assert_close(other(X), model(X))
    wide = small()
    lora.add_adapters(wide, ["*"], {"quality": 4})
    with pytest.raises(ValueError, match="has rank 2, and here it is 4"):
        lora.load_adapters(wide, state)
    with pytest.raises(ValueError, match=r"the model has no 0\.lora_A\.quality\.weight"):
        lora.load_adapters(nn.Sequential(nn.Linear(2, 2)), state)


def test_refusals():
    with pytest.raises(ValueError, match="groups"):
        lora.add_adapters(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["*"], {"a": 1})
    with pytest.raises(ValueError, match="matches no submodule"):
        lora.add_adapters(small(), ["nothing"], {"a": 1})
    with pytest.raises(ValueError, match="has an adapter 'quality' already"):
        lora.add_adapters(adapted(), ["3"], {"quality": 1})
    with pytest.raises(ValueError, match="adapters is empty"):
        lora.add_adapters(small(), ["*"], {})
    with pytest.raises(ValueError, match=r"rank of a is 0: give a rank in \[1, inf\)"):
        lora.add_adapters(small(), ["*"], {"a": 0})
    with pytest.raises(ValueError, match="give a word"):
        lora.add_adapters(small(), ["*"], {"a.b": 1})
    with pytest.raises(ValueError, match="there is no adapter 'x': the model has quality, consistency"):
        lora.train_adapters(adapted(), ["x"])


def test_further_adapters_go_on_the_same_layers_with_own_draws():
    model = adapted()
    generator = torch.Generator().manual_seed(3)
    assert lora.add_adapters(model, ["*"], {"third": 2}, generator=generator) == ["0", "3"]
    again = small()
    lora.add_adapters(again, ["*"], {"third": 2}, generator=torch.Generator().manual_seed(3))
    ours, theirs = (lora.adapter_state(part, ["third"]) for part in (model, again))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert lora.adapter_names(model) == ["quality", "consistency", "third"]
    assert 0.3 < lora.adapter_state(model, ["third"])["3.lora_A.third.weight"].std() < 0.7  # 1 / r


def test_peft_reads_and_computes_the_same():
    peft = pytest.importorskip("peft", reason="the extra peft isn't installed")
    model, theirs = adapted(), small()
    for name in ("quality", "consistency"):
        rank = {"quality": 2, "consistency": 3}[name]
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=6, target_modules=["0", "3"]), theirs, name)
    for module in theirs.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(["quality", "consistency"])
    theirs.load_state_dict(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(theirs(X), model(X))
