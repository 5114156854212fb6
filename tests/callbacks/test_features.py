"""What is captured, when, and that nothing remains."""

import copy

import pytest
import torch
from torch import nn

from helpers import compiled_classifier, fingerprint, small_network
from lit_methods.callbacks.features import FeatureCapture, one_submodule


def test_keeps_outputs_with_their_graph_in_call_order() -> None:
    network = small_network().eval()
    first, second = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)
    with FeatureCapture(network, ["5", "7"]) as features:
        out = [network(first), network(second)]
        assert [f.shape for f in features.calls["5"]] == [(2, 8), (3, 8)]
        assert features.last["7"] is out[1]
        features.last["5"].sum().backward()
    assert network[0].weight.grad.abs().sum() > 0
    assert network[7].weight.grad is None


def test_clear_pause_resume_close() -> None:
    network = small_network()
    before = fingerprint(network)
    features = FeatureCapture(network, ["7"], active=False)
    x = torch.randn(2, 3, 8, 8)
    network(x)
    assert features.last == {}
    features.resume()
    network(x)
    assert len(features.calls["7"]) == 1
    features.pause()
    network(x)
    assert len(features.calls["7"]) == 1
    features.clear()
    assert features.last == {}
    features.close()
    features.close()
    features.resume()
    network(x)
    assert features.last == {}
    assert fingerprint(network) == before


def test_types_and_outputs_that_are_not_tensors() -> None:
    lstm = nn.Sequential(nn.LSTM(3, 4))
    with FeatureCapture(lstm, [], (nn.LSTM,)) as features:
        lstm(torch.randn(2, 3))
        assert features.last["0"][0].shape == (2, 4)


def test_copies_of_the_module_are_not_captured() -> None:
    network = small_network()
    with FeatureCapture(network, ["7"]) as features:
        copy.deepcopy(network)(torch.randn(2, 3, 8, 8))
        assert features.last == {}


@pytest.mark.parametrize("name", ["network", "network.5"])
def test_compiled_network_the_whole_or_a_part(name: str) -> None:
    torch._dynamo.reset()
    module = compiled_classifier()
    features = FeatureCapture(module, [name])
    out = module.network(torch.randn(2, 3, 8, 8))
    captured = features.last[name]
    assert captured.shape == ((2, 4) if name == "network" else (2, 8))
    assert captured.requires_grad
    if name == "network":
        torch.testing.assert_close(captured, out)
    features.close()


def test_no_match_is_an_error_and_no_choice_captures_nothing() -> None:
    with pytest.raises(ValueError, match="matches no submodule"):
        FeatureCapture(small_network(), ["nowhere"])
    assert FeatureCapture(small_network(), []).calls == {}


def test_a_second_pass_is_kept_apart_from_every_capture_of_the_module() -> None:
    network = small_network().eval()
    x = torch.randn(2, 3, 8, 8)
    mine, other, paused = FeatureCapture(network, ["7"]), FeatureCapture(network, ["5"]), FeatureCapture(network, ["5"], active=False)
    elsewhere = FeatureCapture(stranger := small_network(), ["7"])
    network(x)
    with mine.apart() as calls:
        again = network(x + 1)
        stranger(x)
    assert [output is again for output in calls["7"]] == [True]
    assert [len(capture.last) for capture in (mine, other, paused, elsewhere)] == [1, 1, 0, 1]
    assert mine.last["7"] is not again
    network(x)
    assert [len(mine.calls["7"]), len(other.calls["5"]), len(paused.calls["5"])] == [2, 2, 0]
    ((arguments, keywords), _) = mine.arguments["7"]
    assert arguments[0].shape == (2, 8)
    assert keywords == {}
    with pytest.raises(ZeroDivisionError), mine.apart():
        raise ZeroDivisionError
    network(x)
    assert len(other.calls["5"]) == 3  # it goes on after an exception, too


def test_one_submodule_is_named_or_what_is_wrong() -> None:
    network = small_network()
    assert one_submodule(network, "7", "head") == ("7", network[7])
    with pytest.raises(ValueError, match=r"head: targets\[0\]='nowhere' matches no submodule of Sequential; nearest"):
        one_submodule(network, "nowhere", "head")
    with pytest.raises(ValueError, match=r"head='\[57\]' matches 2 submodules, 5, 7: name one"):
        one_submodule(network, "[57]", "head")
