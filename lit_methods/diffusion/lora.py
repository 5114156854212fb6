"""Low-rank adapters with names beside linear layers and convolutions: several at once, each switched, scaled, merged and saved by itself.

W' = W + sum_a w_a (alpha / r_a) B_a A_a, with A_a ~ N(0, 1 / r_a) and B_a = 0 at the start (arXiv:2106.09685). Parameters are called as in
the library peft (``lora_A.<name>.weight``), so that adapters go from one to the other. peft itself isn't used: there an adapter that is
active but not trained, beside one that is, must be frozen by hand, and its import brings two further libraries into every run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.targets import select_modules


class LoRALayer(nn.Module):
    """A frozen layer and its adapters, by name. Subclasses make the two factors.

    Args:
        base_layer: Layer that the adapters stand beside; it is frozen.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scales: dict[str, float] = {}  # alpha / r
        self.weights: dict[str, float] = {}  # w_a: 0 is off
        self.original: Tensor | None = None  # the layer's own weight, while adapters are merged into it

    def _factors(self, rank: int) -> tuple[nn.Module, nn.Module]:
        """A and B of an adapter."""
        raise NotImplementedError

    def _product(self, name: str) -> Tensor:
        """B A of an adapter, in the shape of the layer's weight."""
        raise NotImplementedError

    def add(self, name: str, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        """Put a further adapter on, which changes nothing yet."""
        first, last = self._factors(rank)
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        drawn = torch.randn(first.weight.shape, generator=generator) / rank  # type: ignore[arg-type]
        with torch.no_grad():
            first.weight.copy_(drawn)  # type: ignore[operator]
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        self.lora_A[name], self.lora_B[name] = first.to(weight), last.to(weight)
        self.scales[name], self.weights[name] = alpha / rank, 1.0

    def rank(self, name: str) -> int:
        """Rank of an adapter."""
        weight = self.lora_A[name].weight
        assert isinstance(weight, Tensor)
        return len(weight)

    def delta(self, name: str) -> Tensor:
        """(alpha / r) B A, like the layer's weight; w_a isn't in it."""
        return self.scales[name] * self._product(name)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with all adapters that are on."""
        y: Tensor = self.base_layer(x)
        if self.original is None:
            for name, weight in self.weights.items():
                if weight:
                    y = y + weight * self.scales[name] * self.lora_B[name](self.lora_A[name](x))
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Add what is on to the layer's weight, so that it costs nothing; a second call does nothing."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        if self.original is None:
            self.original = weight.detach().clone()
            for name, factor in self.weights.items():
                if factor:
                    weight += (factor * self.delta(name)).to(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the layer's own weight back, bit for bit."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        if self.original is not None:
            weight.copy_(self.original)
            self.original = None


class LoRALinear(LoRALayer):
    """Adapters of a linear layer: A is (r, in), B is (out, r)."""

    base_layer: nn.Linear

    def _factors(self, rank: int) -> tuple[nn.Module, nn.Module]:
        layer = self.base_layer
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)

    def _product(self, name: str) -> Tensor:
        return self.lora_B[name].weight @ self.lora_A[name].weight  # type: ignore[operator,return-value]


class LoRAConv2d(LoRALayer):
    """Adapters of a convolution: A is a convolution of the same kernel into r channels, B one of 1 x 1."""

    base_layer: nn.Conv2d

    def _factors(self, rank: int) -> tuple[nn.Module, nn.Module]:
        layer = self.base_layer
        first = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,  # type: ignore[arg-type]
            padding_mode=layer.padding_mode,
        )  # fmt: skip
        return first, nn.Conv2d(rank, layer.out_channels, 1, bias=False)

    def _product(self, name: str) -> Tensor:
        return torch.einsum("or,rikl->oikl", self.lora_B[name].weight.flatten(1), self.lora_A[name].weight)  # type: ignore[operator,arg-type]


# ---- whole models ----------------------------------------------------------------------------------------------------------------------


def add_adapters(
    model: nn.Module,
    targets: Sequence[str],
    adapters: Mapping[str, int],
    alpha: float = 8.0,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Put adapters beside chosen layers of a model, in place; the layers are frozen, the adapters trained.

    Args:
        model: Any module. Layers that have adapters get further ones.
        targets: ``fnmatch`` patterns on names of linear layers and 2-d convolutions, such as ``*.to_q``; ``*`` takes all of them.
        adapters: Name -> rank r.
        alpha: The factor of B A is alpha / r.
        generator: Draws A, on the CPU; None: torch's own.

    Returns:
        Names of the layers.

    Raises:
        ValueError: A pattern matches nothing, an adapter of that name is there, or a convolution works in groups.
    """
    checks.patterns(targets=targets)
    checks.positive(alpha=alpha)
    if not adapters:
        raise ValueError("adapters is empty: give names and ranks, such as {'detail': 4}")
    for name, rank in adapters.items():
        checks.at_least(1, "a rank", **{f"rank of {name}": rank})
        if not name.isidentifier():
            raise ValueError(f"an adapter is called {name!r}: give a word of letters, digits and _")
    old = {name for name, _ in adapter_layers(model)}
    below = tuple(f"{name}." for name in old)
    chosen = [name for name in select_modules(model, targets, (nn.Linear, nn.Conv2d, LoRALayer)) if not name.startswith(below)]
    modules = dict(model.named_modules())
    for name in chosen:
        layer = modules[name]
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"{name} is a convolution in {layer.groups} groups, which B A doesn't fit: leave it out of targets")
        if not isinstance(layer, LoRALayer):
            layer = LoRAConv2d(layer) if isinstance(layer, nn.Conv2d) else LoRALinear(layer)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer)
        for adapter, rank in adapters.items():
            if adapter in layer.scales:
                raise ValueError(f"{name} has an adapter {adapter!r} already: give another name")
            layer.add(adapter, rank, alpha, generator)
    return chosen


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Layers with adapters, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for _, layer in adapter_layers(model) for name in layer.scales))


def _known(model: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(model)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no adapter {unknown[0]!r}: the model has {', '.join(known) or 'none'}")


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """A and B of an adapter in all layers.

    Raises:
        ValueError: There is no such adapter.
    """
    _known(model, [name])
    for _, layer in adapter_layers(model):
        if name in layer.scales:
            yield from (*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters())


def train_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Let these adapters learn, and no others; all that are on go on working.

    Raises:
        ValueError: There is no such adapter.
    """
    _known(model, names)
    for name in adapter_names(model):
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(name in names)


def weigh_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Set w_a of adapters; 0 switches one off. Others stay as they are.

    Raises:
        ValueError: There is no such adapter, or adapters are merged just now.
    """
    _known(model, list(weights))
    for name, layer in adapter_layers(model):
        if layer.original is not None:
            raise ValueError(f"the adapters of {name} are merged: call unmerge first")
        layer.weights.update({adapter: weight for adapter, weight in weights.items() if adapter in layer.weights})


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what it was without adapters.

    Raises:
        ValueError: Adapters are merged just now.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    before = [dict(layer.weights) for layer in layers]
    try:
        weigh_adapters(model, dict.fromkeys(adapter_names(model), 0.0))
        yield
    finally:
        for layer, weights in zip(layers, before, strict=True):
            layer.weights.update(weights)


def merge(model: nn.Module) -> None:
    """Add all adapters that are on to the weights; the layers keep their own for :func:`unmerge`."""
    for _, layer in adapter_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the weights again, bit for bit."""
    for _, layer in adapter_layers(model):
        layer.unmerge()


def fuse(model: nn.Module) -> None:
    """Merge for good: plain layers, whose weights have all adapters in them that are on."""
    for name, layer in list(adapter_layers(model)):
        layer.merge()
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer.base_layer)


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """A and B of adapters by peft's names, such as ``mid.to_q.lora_A.detail.weight``; None: of all."""
    chosen = adapter_names(model) if names is None else list(names)
    _known(model, chosen)
    return {
        f"{name}.{part}.{adapter}.weight": getattr(layer, part)[adapter].weight
        for name, layer in adapter_layers(model)
        for part in ("lora_A", "lora_B")
        for adapter in layer.scales
        if adapter in chosen
    }


def load_adapters(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over A and B of :func:`adapter_state`; adapters that aren't in it stay as they are.

    Raises:
        ValueError: Another rank, another shape, or a name that the model doesn't have.
    """
    here = adapter_state(model)
    check_ranks({name: tuple(value.shape) for name, value in here.items()}, state)
    if unknown := sorted(set(state) - set(here)):
        raise ValueError(f"the model has no {unknown[0]} (and {len(unknown) - 1} more): add adapters of the same names to the same layers")
    with torch.no_grad():
        for name, value in state.items():
            here[name].copy_(value)


def check_ranks(shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> None:
    """Raise if adapters that are to be loaded have another rank than those that are there.

    Args:
        shapes: Name -> shape of what is there.
        state: Name -> tensor of what is loaded.

    Raises:
        ValueError: Ranks or sizes differ; the message has both.
    """
    for name, value in state.items():
        there = tuple(shapes.get(name, value.shape))
        if "lora_" in name and there != tuple(value.shape):
            side = 0 if "lora_A" in name else 1
            if there[side] != value.shape[side]:
                raise ValueError(f"{name} has rank {value.shape[side]}, and here it is {there[side]}: give the rank it was trained with")
            raise ValueError(f"{name} is {tuple(value.shape)}, and here it is {there}: it belongs to another model")


__all__ = [
    "LoRAConv2d",
    "LoRALayer",
    "LoRALinear",
    "adapter_layers",
    "adapter_names",
    "adapter_parameters",
    "adapter_state",
    "adapters_off",
    "add_adapters",
    "check_ranks",
    "fuse",
    "load_adapters",
    "merge",
    "train_adapters",
    "unmerge",
    "weigh_adapters",
]
