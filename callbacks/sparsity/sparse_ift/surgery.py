"""Sparse-IFT's layers, and how they take the place of a module's own."""

import copy
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lit_methods import checks
from lit_methods.callbacks.sparsity.channels import channel_counts, set_widths
from lit_methods.callbacks.sparsity.sparse_ift import core
from lit_methods.callbacks.sparsity.sparse_ift.core import Family, Init, UVLayer
from lit_methods.callbacks.sparsity.store import prunable_weights
from lit_methods.callbacks.targets import plain_module, plain_modules, plain_name
from lit_methods.seeds import own_seed


class OverFeatures(nn.Module):
    """Batch norm over the last dimension of (..., features): what linear layers need on vectors and on tokens alike.

    Args:
        features: Size of the last dimension.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> the same shape."""
        return self.norm(x.flatten(0, -2)).view(x.shape) if x.ndim > 2 else self.norm(x)


class Factorized(nn.Module):
    """V sigma(BN(U x)) in the place of W x; submodules ``u``, ``norm`` (perhaps), ``v``.

    Args:
        u: First layer.
        v: Second one, pointwise.
        norm: Batch norm between them.
        relu: ReLU after the norm.
    """

    def __init__(self, u: nn.Module, v: nn.Module, norm: nn.Module | None = None, relu: bool = False) -> None:
        super().__init__()
        self.u, self.norm, self.v, self.relu = u, norm, v, relu

    def forward(self, x: Tensor) -> Tensor:
        """Input and output of the dense layer."""
        x = self.u(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.v(x.relu() if self.relu else x)


class Doped(nn.Module):
    """W_s x + V U x in the place of W x; submodules ``sparse``, ``u``, ``v``.

    Args:
        sparse: W_s, of the dense layer's shape.
        u: First factor of the dense part.
        v: Second one, pointwise.
    """

    def __init__(self, sparse: nn.Module, u: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.sparse, self.u, self.v = sparse, u, v

    def forward(self, x: Tensor) -> Tensor:
        """Input and output of the dense layer."""
        return self.sparse(x) + self.v(self.u(x))


class Parallel(nn.Module):
    """sum_j BN_j(W_j x) in the place of BN(W x); submodules ``branches.j``, ``norms.j``.

    Args:
        branches: Layers of the dense one's shape.
        norms: As many norms.
    """

    def __init__(self, branches: Sequence[nn.Module], norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches, self.norms = nn.ModuleList(branches), nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        """Input of the dense layer, output of its norm."""
        return functools.reduce(torch.add, [norm(branch(x)) for branch, norm in zip(self.branches, self.norms, strict=True)])


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_OF = {nn.Linear: OverFeatures, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_KERNEL = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _sizes(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Inputs, outputs, kernel size."""
    widths: Any = channel_counts(layer)
    return widths["in"], widths["out"], tuple(getattr(layer, "kernel_size", ()))


def _new(layer: Any, inputs: int, outputs: int, bias: bool, pointwise: bool = False) -> nn.Module:
    """A layer of the same kind; a pointwise one has a kernel of 1 and stride 1."""
    shape: dict[str, Any] = {} if isinstance(layer, nn.Linear) else {key: getattr(layer, key) for key in _KERNEL}
    shape = {"kernel_size": 1} if shape and pointwise else shape
    made: nn.Module = type(layer)(inputs, outputs, bias=bias, **shape)
    return made.to(layer.weight.device, layer.weight.dtype)


def _new_norm(layer: Any, features: int) -> nn.Module:
    made: nn.Module = _NORM_OF[type(layer)](features)
    return made.to(layer.weight.device, layer.weight.dtype)


def _check_layer(layer: nn.Module, groups: bool = False) -> None:
    if type(layer) not in _LAYERS:
        raise ValueError(f"{type(layer).__name__} is none of {', '.join(kind.__name__ for kind in _LAYERS)}")
    if not groups and getattr(layer, "groups", 1) != 1:
        raise ValueError(f"a convolution in {layer.groups} groups: sizes are known for ordinary ones alone")


def factorize(layer: nn.Module, sparsity: float, uv_layer: UVLayer = "nonlinear_relu", sparse_u_only: bool = False) -> Factorized:
    """Sparse Factorized: new layers in the place of a linear layer or convolution.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d`` without groups. U has its kernel, stride and padding; V is pointwise and
            has its bias.
        sparsity: s.
        uv_layer: Between U and V: nothing (``linear``), batch norm (``nonlinear_norelu``), batch norm and ReLU (``nonlinear_relu``).
        sparse_u_only: V will stay dense.

    Returns:
        Untrained, of torch's own initialisation.

    Raises:
        ValueError: Another layer, or an unknown ``uv_layer``.
    """
    checks.one_of(UVLayer, uv_layer=uv_layer)
    _check_layer(layer)
    inputs, outputs, kernel = _sizes(layer)
    width = core.factorized_width(inputs, outputs, sparsity, kernel, sparse_u_only)
    norm = None if uv_layer == "linear" else _new_norm(layer, width)
    u, v = _new(layer, inputs, width, bias=False), _new(layer, width, outputs, layer.bias is not None, pointwise=True)
    return Factorized(u, v, norm, uv_layer == "nonlinear_relu")


def dope(layer: nn.Module, sparsity: float) -> Doped:
    """Sparse Doped: new layers in the place of a linear layer or convolution.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d`` without groups; the sparse part has its bias.
        sparsity: s of the sparse part, above 0.

    Returns:
        Untrained, of torch's own initialisation.

    Raises:
        ValueError: Another layer, or one that is too small for rank 1.
    """
    _check_layer(layer)
    inputs, outputs, kernel = _sizes(layer)
    rank = core.doped_rank(inputs, outputs, sparsity, kernel)
    if rank < 1:
        raise ValueError(f"at sparsity {sparsity} a layer from {inputs} to {outputs} features has no FLOPs left for rank 1")
    sparse = _new(layer, inputs, outputs, layer.bias is not None)
    return Doped(sparse, _new(layer, inputs, rank, bias=False), _new(layer, rank, outputs, bias=False, pointwise=True))


def parallelize(layer: nn.Module, sparsity: float, norm: nn.Module | None = None) -> Parallel:
    """Sparse Parallel: branches in the place of a layer and of the batch norm that follows it.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d``. Branches have no bias, their norms have one.
        sparsity: s.
        norm: The batch norm that takes the layer's output, whose settings and initial values the branches' norms take over; None: the
            layer has none, the branches get new ones.

    Returns:
        Untrained, of torch's own initialisation.

    Raises:
        ValueError: Another layer.
    """
    _check_layer(layer, groups=True)
    inputs, outputs, _ = _sizes(layer)
    count = core.parallel_branches(sparsity)
    branches = [_new(layer, inputs, outputs, bias=False) for _ in range(count)]
    return Parallel(branches, [_new_norm(layer, outputs) if norm is None else copy.deepcopy(norm) for _ in range(count)])


@dataclass(frozen=True)
class TransformedLayer:
    """What stands where a dense layer stood.

    Attributes:
        name: Name of the dense layer.
        dense_shape: Shape of its weight.
        sparse: Names of the weights in its place that are masked.
        dense: Names of those that stay dense.
        enlarged: It holds more weights than before, and has the dense layer's FLOPs once it is masked.
        folded: Names of the weights of U and V, where the two make one linear map.
    """

    name: str
    dense_shape: tuple[int, ...]
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    enlarged: bool = True
    folded: tuple[str, ...] = ()

    def under(self, prefix: str) -> "TransformedLayer":
        """The same in a module that holds the layer's one under a name; ``prefix`` ends with a dot."""
        names: dict[str, Any] = {kind: tuple(prefix + name for name in getattr(self, kind)) for kind in ("sparse", "dense", "folded")}
        return replace(self, name=(prefix + self.name).rstrip("."), **names)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of all weights in its place."""
        return (*self.sparse, *self.dense)

    @property
    def dense_size(self) -> int:
        """Weights of the dense layer."""
        return math.prod(self.dense_shape)


@dataclass(frozen=True)
class Transformation:
    """What :func:`iso_flop_transform` has done to a module.

    Attributes:
        family: Member of the family.
        sparsity: s.
        uv_layer: What stands between U and V of Factorized.
        sparse_u_only: V of Factorized stays dense.
        layers: All layers whose weights are new, in the module's order.
    """

    family: str
    sparsity: float
    uv_layer: str
    sparse_u_only: bool
    layers: tuple[TransformedLayer, ...]

    def settings(self) -> dict[str, Any]:
        """What must agree between a checkpoint and a run."""
        found: dict[str, Any] = {"family": self.family, "sparsity": self.sparsity}
        return found | ({"uv_layer": self.uv_layer, "sparse_u_only": self.sparse_u_only} if self.family == "factorized" else {})


_MARK = "_sparse_ift"
_PARAMETRISED = "its weight is parametrised, which must come after the transformation"


def transformation_of(module: nn.Module) -> Transformation | None:
    """What has been done to a module or to a part of it; names are those that they have in ``module``. None: nothing.

    Raises:
        ValueError: Two parts were transformed differently.
    """
    found: Transformation | None = None
    for path, part in module.named_modules():
        mine = vars(part).get(_MARK)
        if mine is None:
            continue
        prefix = f"{plain_name(path)}." if plain_name(path) else ""
        layers = tuple(layer.under(prefix) for layer in mine.layers)
        if found is not None and found.settings() != mine.settings():
            raise ValueError(f"two parts of {type(module).__name__} are transformed differently: {found.settings()}, {mine.settings()}")
        found = replace(mine, layers=layers if found is None else (*found.layers, *layers))
    return found


def iso_flop_transform(
    module: nn.Module,
    family: Family,
    sparsity: float,
    *,
    targets: Sequence[str] = (),
    skip: Sequence[str] = (),
    stem: str | None = None,
    head: str | None = None,
    shortcuts: Sequence[str] = ("*downsample*", "*shortcut*"),
    sparse_shortcuts: bool | None = None,
    uv_layer: UVLayer = "nonlinear_relu",
    sparse_u_only: bool = False,
    init: Init = "kaiming_normal",
    zero_init_last: bool = False,
    seed: int = 0,
) -> Transformation:
    """Replace layers of a module by larger ones, which have the dense layers' FLOPs once their masks are applied; in place.

    Call it before optimisers are made; it draws from a generator of its own. Masks are not its business: they cover the weights that the
    result names. Transformed layers are drawn anew.

    Args:
        module: Any module. ``wide`` scales all of it and takes linear layers, convolutions without groups, batch, layer and group norms;
            the others replace single ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d``.
        family: ``wide``, ``parallel``, ``factorized``, ``doped``, or ``none``: no layer is enlarged, the baseline.
        sparsity: s of the masks to come, in [0, 1).
        targets: ``fnmatch`` patterns on names of layers; empty: all linear layers and convolutions but stem, head and shortcuts.
        skip: Patterns on names of layers that stay dense.
        stem: Name of the first layer, dense, whose inputs ``wide`` doesn't scale; None: the first linear layer or convolution.
        head: Name of the last layer, dense, whose outputs ``wide`` doesn't scale; None: the last one.
        shortcuts: Patterns on names: pointwise convolutions that match are shortcuts.
        sparse_shortcuts: Mask shortcuts; ``wide`` enlarges them with the rest, the others mask them as they are, as the authors' code
            does, with fewer FLOPs than before. None: for ``wide`` alone.
        uv_layer: What stands between U and V of ``factorized``, as in :func:`factorize`.
        sparse_u_only: V of ``factorized`` stays dense.
        init: Start of the new weights: ``kaiming_normal`` by fan-out for ReLU, biases 0; ``default``: torch's own. Norms start as the dense
            network's do.
        zero_init_last: Start the scale of the last norm of each residual block (``conv1``, ``bn1``, ``conv2``, ``bn2``, ...) at 0.
        seed: Seed of the new weights.

    Returns:
        What was done; :func:`transformation_of` finds it again.

    Raises:
        ValueError: Something can't be transformed; the message says what and why. The module is then unchanged.
    """
    core.base_scaling(sparsity)
    checks.one_of(Family, family=family)
    checks.one_of(UVLayer, uv_layer=uv_layer)
    checks.one_of(Init, init=init)
    if transformation_of(module) is not None:
        raise ValueError(f"{type(module).__name__} is transformed already: transform a dense module")
    modules = plain_modules(module)
    matrices = [name for name, part in modules.items() if isinstance(part, (nn.Linear, _ConvNd))]
    if not matrices:
        late = "if it makes its layers later, call iso_flop_transform at the end of its configure_model"
        raise ValueError(f"{type(module).__name__} has no linear layer or convolution: {late}")
    ends = [matrices[0] if stem is None else stem, matrices[-1] if head is None else head]
    for argument, name in zip(("stem", "head"), ends, strict=True):
        if name not in matrices:
            raise ValueError(f"{argument} is {name!r}, no linear layer or convolution of {type(module).__name__}: {', '.join(matrices)}")
    for name in matrices:
        wanted = any(fnmatchcase(name, pattern) for pattern in targets) if targets else name not in ends
        if wanted and not any(fnmatchcase(name, pattern) for pattern in skip):
            _refuse(module, family, {name: _PARAMETRISED} if _is_parametrised(modules[name]) else {})
    weights = prunable_weights(module, targets, skip)
    chosen = [name.rpartition(".")[0] for name in weights]
    chosen = [name for name in dict.fromkeys(chosen) if targets or name not in ends]
    pointwise = {name for name in matrices if set(_sizes(modules[name])[2]) == {1} and any(fnmatchcase(name, p) for p in shortcuts)}
    masks_shortcuts = family in ("wide", "none") if sparse_shortcuts is None else sparse_shortcuts
    chosen = [name for name in chosen if name not in pointwise or masks_shortcuts]
    enlarged = [name for name in chosen if family in ("wide", "none") or name not in pointwise]
    if not enlarged:
        ends_text = f"stem {ends[0]!r} and head {ends[1]!r}"
        raise ValueError(f"{type(module).__name__} has no hidden layer to transform beside {ends_text}: name layers by targets")
    last_norms = _last_norms(module) if zero_init_last else []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own_seed("SparseIFT", seed))  # the CPU's alone: others wouldn't be restored
        if family == "wide":
            layers = _widen(module, modules, chosen, ends, sparsity, init)
        else:
            make = functools.partial(_member, family=family, sparsity=sparsity, uv_layer=uv_layer, sparse_u_only=sparse_u_only)
            made = _make(module, modules, enlarged if family != "none" else (), family, make)
            layers = _replace(modules, chosen, weights, made, init)
    for block, number in last_norms:
        _zero_scale(block, number)
    done = Transformation(family, sparsity, uv_layer, sparse_u_only, tuple(layers))
    setattr(plain_module(module), _MARK, done)
    return done


def _is_parametrised(layer: nn.Module) -> bool:
    """Whether its weight is made in the forward pass, by torch's parametrisations or its older ``weight_norm`` and pruning."""
    return hasattr(layer, "parametrizations") or (isinstance(layer, (nn.Linear, _ConvNd)) and "weight" not in layer._parameters)


def _obstacle(layer: nn.Module, counts: Mapping[int, int]) -> str | None:
    """Why a layer can't get new weights."""
    if _is_parametrised(layer):
        return _PARAMETRISED
    if any(counts.get(id(parameter), 0) > 1 for parameter in layer.parameters()):
        return "its weight is shared with another layer"
    if not all(parameter.requires_grad for parameter in layer.parameters()):
        return "it is frozen, and would be drawn anew"
    return None


def _uses(root: nn.Module) -> dict[int, int]:
    """By id of a parameter: how many places hold it."""
    counts: dict[int, int] = {}
    for _, parameter in root.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _refuse(root: nn.Module, family: str, problems: Mapping[str, str]) -> None:
    if problems:
        name, why = next(iter(problems.items()))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        way = "name other layers by targets, or leave it out by skip"
        if family == "wide":
            way = "transform a submodule that it can, by network, or choose parallel, factorized or doped"
        raise ValueError(f"Sparse-IFT {family!r} can't transform {name} of {type(root).__name__}{more}: {why}; {way}")


def _initialise(layers: Sequence[nn.Module], init: Init) -> None:
    for layer in layers:
        device = layer.weight.device
        layer.to("cpu")  # the same numbers whatever the device
        if init == "default":
            layer.reset_parameters()  # type: ignore[operator]
        else:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        layer.to(device)  # type: ignore[arg-type]


def _parent(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return modules[parent], child


def _following_norm(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Name of the batch norm that stands next to a layer in its parent, if it takes the layer's output."""
    parent, child = _parent(modules, name)
    names = list(parent._modules)
    after = names[names.index(child) + 1 :][:1]
    norm = parent._modules[after[0]] if after else None
    if type(norm) not in _NORMS or norm.num_features != _sizes(modules[name])[1]:  # type: ignore[union-attr]
        return None
    return f"{name.rpartition('.')[0]}.{after[0]}".lstrip(".")


@dataclass(frozen=True)
class _Member:
    """What takes a layer's place, and the name of the norm that goes with the old one; names in ``record`` are those below ``new``."""

    new: nn.Module
    record: TransformedLayer
    norm: str | None = None


def _member(layer: nn.Module, norm: nn.Module | None, family: Family, sparsity: float, uv_layer: UVLayer, sparse_u_only: bool) -> _Member:
    """What takes a layer's place."""
    u, v = "u.weight", "v.weight"
    sparse: tuple[str, ...] = (u, v)
    dense: tuple[str, ...] = ()
    new: Any
    if family == "parallel":
        new = parallelize(layer, sparsity, norm)
        sparse = tuple(f"branches.{j}.weight" for j in range(len(new.branches)))
    elif family == "doped":
        new, sparse, dense = dope(layer, sparsity), ("sparse.weight",), (u, v)
    else:
        new = factorize(layer, sparsity, uv_layer, sparse_u_only)
        sparse, dense = ((u,), (v,)) if sparse_u_only else ((u, v), ())
    folded = (u, v) if family == "doped" or (family == "factorized" and uv_layer == "linear") else ()
    return _Member(new, TransformedLayer("", tuple(layer.weight.shape), sparse, dense, folded=folded))  # type: ignore[arg-type]


def _make(
    root: nn.Module, modules: Mapping[str, nn.Module], enlarged: Sequence[str], family: str, make: Callable[..., _Member]
) -> dict[str, _Member]:
    """New layers by name."""
    counts = _uses(root)
    made: dict[str, _Member] = {}
    problems: dict[str, str] = {}
    for name in enlarged:
        layer, (parent, _) = modules[name], _parent(modules, name)
        why = _obstacle(layer, counts)
        if any(getattr(layer, kind, None) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
            why = "it has hooks, which would be lost: put SparseIFT before the callback that added them"
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(layer, nn.Linear):
            why = "torch's fast path of TransformerEncoderLayer reads the layer's weight"
        if why is None:
            try:
                norm = _following_norm(modules, name) if family == "parallel" else None
                made[name] = replace(make(layer, None if norm is None else modules[norm]), norm=norm)
            except ValueError as error:
                why = str(error)
        if why is not None:
            problems[name] = why
    _refuse(root, family, problems)
    return made


def _replace(
    modules: Mapping[str, nn.Module], chosen: Sequence[str], weights: Mapping[str, Tensor], made: Mapping[str, _Member], init: Init
) -> list[TransformedLayer]:
    """Everything but Wide: layer by layer; chosen layers without a new one are masked as they are."""
    layers = []
    for name in chosen:
        if name in made:
            member = made[name]
            _initialise([part for part in member.new.modules() if type(part) in _LAYERS], init)
            setattr(*_parent(modules, name), member.new)
            if member.norm is not None:
                setattr(*_parent(modules, member.norm), nn.Identity())
            layers.append(member.record.under(f"{name}."))
            continue
        for own, value in modules[name].named_parameters(recurse=False):
            path = f"{name}.{own}" if name else own
            if path in weights:
                layers.append(TransformedLayer(path.rpartition(".")[0], tuple(value.shape), (path,), enlarged=False))
    return layers


def _widen(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    chosen: Sequence[str],
    ends: Sequence[str],
    sparsity: float,
    init: Init,
) -> list[TransformedLayer]:
    """Scale every hidden width, in place, so that hooks and references stay."""
    names = list(modules)
    inner = range(names.index(ends[0]), names.index(ends[1]) + 1)  # norms outside see inputs or outputs of the network
    counts, problems = _uses(root), {}
    matrices: list[str] = []
    norms: list[str] = []
    widths: set[int] = set()
    for position, (name, part) in enumerate(modules.items()):
        if isinstance(part, (nn.Linear, _ConvNd)):
            why = _obstacle(part, counts)
            if not isinstance(part, _LAYERS):
                why = f"{type(part).__name__} is none of {', '.join(kind.__name__ for kind in _LAYERS)}"
            elif getattr(part, "groups", 1) != 1:
                why = "it is a convolution in groups, whose widths don't scale alike"
            if why is not None:
                problems[name] = why
                continue
            matrices.append(name)
            inputs, outputs, _ = _sizes(part)
            widths |= {inputs} - ({inputs} if name == ends[0] else set())
            widths |= {outputs} - ({outputs} if name == ends[1] else set())
        elif isinstance(part, (_BatchNorm, nn.GroupNorm)) or (isinstance(part, nn.LayerNorm) and len(part.normalized_shape) == 1):
            if position in inner:
                norms.append(name)
                widths.add(_norm_width(part))
        elif any(parameter.numel() > 1 for parameter in part.parameters(recurse=False)):
            problems[name or type(root).__name__] = f"{type(part).__name__} holds weights of its own, whose widths aren't known"
    base = math.gcd(*widths)
    wide = core.wide_width(base, sparsity)

    def scaled(width: int) -> int:
        return width // base * wide

    for name in norms:
        part = modules[name]
        if isinstance(part, nn.GroupNorm) and scaled(part.num_channels) % part.num_groups:
            problems[name] = f"{scaled(part.num_channels)} channels don't divide into {part.num_groups} groups"
    _refuse(root, "wide", problems)
    layers = []
    with torch.no_grad():
        for name in matrices:
            layer = modules[name]
            shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
            inputs, outputs, _ = _sizes(layer)
            _resize(layer, inputs if name == ends[0] else scaled(inputs), outputs if name == ends[1] else scaled(outputs))
            weight = f"{name}.weight" if name else "weight"
            masked, dense = ((weight,), ()) if name in chosen else ((), (weight,))
            layers.append(TransformedLayer(name, shape, masked, dense, enlarged=name not in ends))
        for name in norms:
            _resize_norm(modules[name], scaled(_norm_width(modules[name])))
        _initialise([modules[name] for name in matrices], init)
    return layers


def _resize(layer: Any, inputs: int, outputs: int) -> None:
    set_widths(layer, {"in": inputs, "out": outputs})
    layer.weight = nn.Parameter(layer.weight.new_empty(outputs, inputs, *layer.weight.shape[2:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.weight.new_empty(outputs))


def _norm_width(norm: Any) -> int:
    """Width of a batch, group or layer norm."""
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[0]
    return int(norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)


def _resize_norm(norm: Any, width: int) -> None:
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (width,)
    set_widths(norm, {"out": width})
    for name, ordinary in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
        value = getattr(norm, name, None)
        if isinstance(value, nn.Parameter):
            start = float(value.flatten()[0])
            same = bool((value == start).all())  # a start of 0 was meant so
            setattr(norm, name, nn.Parameter(value.new_full((width,), start if same else ordinary)))
        elif isinstance(value, Tensor):
            setattr(norm, name, value.new_full((width,), ordinary))


def _last_norms(root: nn.Module) -> list[tuple[nn.Module, int]]:
    """Residual blocks, which number their parts (conv1, bn1, conv2, bn2, ...), with the number of their last norm."""
    found = []
    for part in root.modules():
        numbers = [int(key[2:]) for key in part._modules if re.fullmatch(r"bn\d+", key) and f"conv{key[2:]}" in part._modules]
        if len(numbers) > 1:
            found.append((part, max(numbers)))
    if not found:
        raise ValueError(f"zero_init_last finds no residual block with conv1, bn1, conv2, bn2 in {type(root).__name__}: set it to false")
    return found


def _zero_scale(block: nn.Module, number: int) -> None:
    conv, norm = block.get_submodule(f"conv{number}"), block.get_submodule(f"bn{number}")
    for one in conv.norms if isinstance(conv, Parallel) and isinstance(norm, nn.Identity) else [norm]:
        nn.init.zeros_(one.weight)  # type: ignore[arg-type]


def flops_against_dense(
    layers: Sequence[TransformedLayer],
    macs: Mapping[str, int],
    sizes: Mapping[str, int],
    density: Mapping[str, float],
) -> list[tuple[float, float]]:
    """MACs of each transformed layer, and of the dense one that stood there.

    A weight of a linear layer or convolution is used equally often whatever the layer's width, so that the dense layer's MACs follow from
    those of any weight in its place.

    Args:
        layers: Transformed layers of the module.
        macs: Name of a weight -> MACs that all its entries take part in, see
            :func:`~lit_methods.callbacks.sparsity.flops.count_macs`.
        sizes: Name -> number of entries.
        density: Name -> share of active entries; 1 for the others.

    Returns:
        For each layer (MACs now, MACs of the dense layer).
    """
    found = []
    for layer in layers:
        uses = macs[layer.weights[0]] / sizes[layer.weights[0]]
        found.append((sum(macs[name] * density.get(name, 1.0) for name in layer.weights), uses * layer.dense_size))
    return found
