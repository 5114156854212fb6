"""Copies of a module: hooks that compute act on the copy, callbacks' hooks stay behind, and nothing in the original moves."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers import fingerprint, tiny_trainer
from lit_methods.callbacks.features import FeatureCapture
from lit_methods.callbacks.twin import copy_of, evaluating, shadow, unwritten


def add(adapter: nn.Module, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output + adapter(arguments[0])


class Adapter:
    """A hook that is an object."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output + self.layer(arguments[0])


class Hooked(BoringModel):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.adapter = nn.Linear(32, 2), nn.Linear(32, 2)
        adapter = self.adapter
        hooks: dict[str, Callable[..., Any]] = {
            "closure": lambda module, arguments, output: output + adapter(arguments[0]),
            "closure of the module": lambda module, arguments, output: output + self.adapter(arguments[0]),
            "default": lambda module, arguments, output, adapter=adapter: output + adapter(arguments[0]),
            "partial": functools.partial(add, adapter),
            "method": self.adapted,
            "object": Adapter(adapter),
        }
        self.layer.register_forward_hook(hooks[kind])

    def adapted(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output + self.adapter(arguments[0])


KINDS = ("closure", "closure of the module", "default", "partial", "method", "object")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_a_hook_puts_on_is_the_copys_own(kind: str) -> None:
    module, x = Hooked(kind), torch.randn(3, 32)
    before, expected = fingerprint(module), module(x)
    twin = copy_of(module)
    torch.testing.assert_close(twin(x), expected)
    with torch.no_grad():
        module.adapter.weight.add_(1)
    torch.testing.assert_close(twin(x), expected, msg="the copy's adapter hasn't moved")
    assert not torch.equal(module(x), expected)
    assert fingerprint(module) == before
    for parameter in twin.adapter.parameters():  # type: ignore[union-attr]
        assert parameter.grad is None
    twin(x).sum().backward()
    assert twin.adapter.weight.grad is not None  # type: ignore[union-attr]
    assert module.adapter.weight.grad is None


def test_functions_of_the_instance_act_on_the_copy() -> None:
    module = Hooked("closure")
    module.plain = lambda x: module.layer(x)  # type: ignore[method-assign, assignment]
    module.compiled = torch.compile(module.forward, backend="eager")  # type: ignore[method-assign, assignment]
    twin, x = copy_of(module), torch.randn(3, 32)
    expected = module.plain(x), module.compiled(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.testing.assert_close((twin.plain(x), twin.compiled(x)), expected)


def test_hooks_of_callbacks_stay_behind() -> None:
    module = Hooked("closure")
    module.layer.register_forward_hook(lambda module, arguments, output: output * 2, prepend=True)
    with FeatureCapture(module, ["layer"]) as features:
        twin = copy_of(module)
        assert len(module.layer._forward_hooks) == 3
        assert len(twin.layer._forward_hooks) == 2  # type: ignore[union-attr, arg-type]
        twin(torch.randn(3, 32))
        assert not features.last


GRAPHS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a kept output": lambda layer: setattr(layer, "kept", [layer(torch.ones(1, 32))]),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_modules_with_tensors_in_a_graph(kind: str) -> None:
    module, x = BoringModel(), torch.randn(3, 32)
    GRAPHS[kind](module.layer)
    module(x)
    module.eval()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(module)
    expected = module(x)
    twin = copy_of(module)
    torch.testing.assert_close(twin(x), expected)
    twin(x).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    looked = shadow(tiny_trainer(), module)
    torch.testing.assert_close(looked(x), expected)
    assert {id(parameter) for parameter in looked.parameters()} == {id(parameter) for parameter in module.parameters()}


WRITES: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "at a place": lambda layer: layer.weight.__setitem__(0, 0.0),
    "a list at once": lambda layer: torch._foreach_mul_([layer.weight, layer.bias], 2.0),
    "as the output": lambda layer: torch.add(layer.bias, 1, out=layer.bias.data),
    "its data": lambda layer: setattr(layer.weight, "data", torch.zeros(2, 3)),
    "its data, and that in place": lambda layer: (layer.bias.mul_(2), setattr(layer.bias, "data", torch.zeros(2)), layer.bias.add_(1)),
}


@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("how", WRITES)
def test_what_is_written_into_parameters_is_undone(how: str, watch: bool) -> None:
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    place = layer.weight.data_ptr(), layer.bias.data_ptr()
    with torch.no_grad(), unwritten(layer, watch=watch):
        WRITES[how](layer)
        assert not (torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    assert (layer.weight.data_ptr(), layer.bias.data_ptr()) == place


def test_it_is_undone_where_a_step_fails_and_reading_copies_nothing() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight.detach().clone()

    def step() -> None:
        with torch.no_grad(), unwritten(layer):
            layer.weight.zero_()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        step()
    assert torch.equal(layer.weight, weight)
    with unwritten(layer):
        layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_each_part_has_its_mode_again_where_a_probe_fails() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    module[1].eval()

    def probe() -> None:
        with evaluating(module):
            assert not module.training
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        probe()
    assert [part.training for part in module.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
