"""Sparse-IFT: larger but sparse layers at the FLOPs of the dense ones, so that masks have more to choose from (arXiv:2303.11525).

Golden vectors come from CerebrasResearch/Sparse-IFT@487c284: ComputerVision/CIFAR/models/cifar_resnet18.py (sizes, blocks),
cbsparse/sparse/optimizers/{rigl,set}.py (updates) and dynamic.py (schedule). The code and the abstract were read, the paper's text was not.
Masks, schedules and FLOPs are the shared ones of this folder. Left out: the authors' search for the sparsity that meets a budget of FLOPs
with stem and head, their Wide-Factorized and SNIP/GraSP arms, masks balanced over attention heads.
"""

import copy
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lit_methods.callbacks.sparsity.callback import refuse_sharded
from lit_methods.callbacks.sparsity.density import layer_density
from lit_methods.callbacks.sparsity.drop_grow import target_count
from lit_methods.callbacks.sparsity.dynamic import DynamicSparsity
from lit_methods.callbacks.sparsity.dynamics import intersection, itop_rate, union
from lit_methods.callbacks.sparsity.masks import own_seed
from lit_methods.callbacks.sparsity.schedules import drop_fraction as drop_fraction_at
from lit_methods.callbacks.sparsity.schedules import is_update_step
from lit_methods.callbacks.sparsity.sparseland.callback import SparsityCard, count_on_batch
from lit_methods.callbacks.sparsity.store import prunable_weights
from lit_methods.callbacks.targets import plain_module, plain_name
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel

TECHNIQUE = Technique(
    slug="sparse_ift",
    title="Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
    arxiv="2303.11525",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.SparseIFT",),
    configs=("sparse_ift.yaml",),
    golden=("isoflop_dims", "mask_update", "drop_schedule", "block_forward"),
    claim="Sparse Wide with RigL at 75 % sparsity reaches a higher test accuracy than the dense network "
    "whose hidden layers have the same FLOPs.",
    summary="Makes hidden layers larger and sparse at equal FLOPs (wide, parallel, factorized, doped) with static, SET or RigL masks.",
)

Family = Literal["wide", "parallel", "factorized", "doped", "none"]
UVLayer = Literal["linear", "nonlinear_norelu", "nonlinear_relu"]
Distribution = Literal["uniform", "er", "erk", "uniform_plus", "er_plus", "erk_plus"]
Init = Literal["kaiming_normal", "default"]

# ---- the maths: sizes ------------------------------------------------------------------------------------------------------------------


def base_scaling(sparsity: float) -> int:
    """B = 1 / (1 - s), rounded to an integer: by how much a sparse layer may hold more weights at equal FLOPs.

    Args:
        sparsity: s in [0, 1). The paper's are 0.5, 0.75 and 0.9, whose B is exact.

    Raises:
        ValueError: s outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}: give a share of removed weights from 0 to below 1, such as 0.75")
    return round(1 / (1.0 - sparsity))


def width_factor(sparsity: float) -> float:
    """Sparse Wide: factor of all hidden widths, sqrt(B)."""
    return math.sqrt(base_scaling(sparsity))


def wide_width(base_width: int, sparsity: float) -> int:
    """Sparse Wide: a scaled width, truncated."""
    return int(base_width * width_factor(sparsity))


def parallel_branches(sparsity: float) -> int:
    """Sparse Parallel: number of branches, B."""
    return base_scaling(sparsity)


def factorized_width(f_in: int, f_out: int, sparsity: float, kernel_size: Sequence[int] = (), sparse_u_only: bool = False) -> int:
    """Sparse Factorized: channels between U and V, rounded up.

    Args:
        f_in: Inputs of the dense layer.
        f_out: Its outputs.
        sparsity: s of U and V, not rounded to 1 / B.
        kernel_size: Of U; () for a linear layer.
        sparse_u_only: V stays dense.

    Raises:
        ValueError: s outside [0, 1).
    """
    base_scaling(sparsity)
    positions = math.prod(kernel_size)
    dense = positions * f_in * f_out
    if sparse_u_only:
        return math.ceil(dense / ((1 - sparsity) * positions * f_in + f_out))
    return math.ceil(dense / ((1 - sparsity) * (positions * f_in + f_out)))


def doped_rank(f_in: int, f_out: int, sparsity: float, kernel_size: Sequence[int] = ()) -> int:
    """Sparse Doped: rank of the dense part V U, rounded down; 0 where the layer is too small for any.

    Args:
        f_in: Inputs of the dense layer.
        f_out: Its outputs.
        sparsity: s of the sparse part, not rounded to 1 / B.
        kernel_size: Of the layer and of U; () for a linear layer.

    Raises:
        ValueError: s outside [0, 1).
    """
    base_scaling(sparsity)
    positions = math.prod(kernel_size)
    return math.floor(sparsity * (positions * (f_in * f_out)) / (positions * f_in + f_out))


# ---- the maths: schedule, folded weight decay, spectrum --------------------------------------------------------------------------------


def drop_schedule(
    total_steps: int,
    interval: int = 100,
    begin: int = 0,
    end_fraction: float = 0.75,
    initial: float = 0.3,
    anneal: Literal["cosine", "constant", "exponential"] = "cosine",
    rate: float = 3.0,
) -> tuple[list[int], list[float]]:
    """All updates of a training: optimiser steps, counted from 1, after which masks change, and the drop fraction of each.

    Args:
        total_steps: Optimiser steps of the training.
        interval: Updates come at its multiples.
        begin: And only after this step.
        end_fraction: And before step int(end_fraction * total_steps).
        initial: Drop fraction at ``begin``.
        anneal: ``cosine`` to 0 at the end, ``constant``, or ``exponential``.
        rate: Of ``exponential``.
    """
    end = int(end_fraction * total_steps)
    steps = [step for step in range(1, total_steps + 1) if is_update_step(step, interval, begin, end)]
    return steps, [drop_fraction_at(step, anneal, initial, begin, end, rate) for step in steps]


def folded_frobenius(u: Tensor, v: Tensor) -> Tensor:
    """Squared Frobenius norm of the folded weight V U.

    Args:
        u: (d, f_in, ...) weight of U.
        v: (f_out, d, 1, ...) weight of V.

    Returns:
        Scalar in the dtype of the weights, differentiable.
    """
    with torch.autocast(u.device.type, enabled=False):
        return (v.flatten(1) @ u.flatten(1)).square().sum()


def spectral_gap(mask: Tensor) -> Tensor:
    """How far a mask is on the good side of the Ramanujan bound, as the graph between inputs and outputs that it is.

    sqrt(d_l - 1) + sqrt(d_r - 1) - sigma_2, with the mean degrees of both sides and the second largest singular value of the adjacency
    matrix. Sparse random regular graphs lie near 0, graphs with bottlenecks below; masks of a notable density above.

    Args:
        mask: bool, (outputs, inputs, ...); kernel positions count as inputs.

    Returns:
        Scalar, float64.
    """
    adjacency = mask.flatten(1).double()
    if adjacency.shape[0] > adjacency.shape[1]:
        adjacency = adjacency.T
    values = torch.linalg.eigvalsh(adjacency @ adjacency.T)  # autocast leaves float64 alone
    second = values[-2].clamp(min=0).sqrt() if len(values) > 1 else values.new_zeros(())
    edges = adjacency.sum()
    degrees = torch.stack([edges / adjacency.shape[0], edges / adjacency.shape[1]])
    return (degrees - 1).clamp(min=0).sqrt().sum() - second


# ---- the layers ------------------------------------------------------------------------------------------------------------------------


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


def _sizes(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Inputs, outputs, kernel size."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, ()
    assert isinstance(layer, _ConvNd)
    return layer.in_channels, layer.out_channels, tuple(layer.kernel_size)


def _new(layer: nn.Module, inputs: int, outputs: int, bias: bool, pointwise: bool = False) -> nn.Module:
    """A layer of the same kind; a pointwise one has a kernel of 1 and stride 1."""
    if isinstance(layer, nn.Linear):
        made: nn.Module = nn.Linear(inputs, outputs, bias)
    else:
        assert isinstance(layer, _ConvNd)
        kind: Any = type(layer)
        if pointwise:
            made = kind(inputs, outputs, 1, bias=bias)
        else:
            shared = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")}
            made = kind(inputs, outputs, bias=bias, **shared)
    return made.to(layer.weight.device, layer.weight.dtype)  # type: ignore[arg-type]


def _new_norm(layer: nn.Module, features: int) -> nn.Module:
    made: nn.Module
    if isinstance(layer, nn.Linear):
        made = OverFeatures(features)
    else:
        made = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}[type(layer)](features)  # type: ignore[index]
    return made.to(layer.weight.device, layer.weight.dtype)  # type: ignore[arg-type]


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
    if uv_layer not in get_args(UVLayer):
        raise ValueError(f"uv_layer is {uv_layer!r}: give one of {', '.join(get_args(UVLayer))}")
    _check_layer(layer)
    inputs, outputs, kernel = _sizes(layer)
    width = factorized_width(inputs, outputs, sparsity, kernel, sparse_u_only)
    norm = None if uv_layer == "linear" else _new_norm(layer, width)
    u, v = _new(layer, inputs, width, bias=False), _new(layer, width, outputs, layer.bias is not None, pointwise=True)
    return Factorized(u, v, norm, uv_layer == "nonlinear_relu")


def dope(layer: nn.Module, sparsity: float) -> Doped:
    """Sparse Doped: new layers in the place of a linear layer or convolution.

    Args:
        layer: As for :func:`factorize`; the sparse part has its bias.
        sparsity: s of the sparse part, above 0.

    Returns:
        Untrained, of torch's own initialisation.

    Raises:
        ValueError: Another layer, or one that is too small for rank 1.
    """
    _check_layer(layer)
    inputs, outputs, kernel = _sizes(layer)
    rank = doped_rank(inputs, outputs, sparsity, kernel)
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
    count = parallel_branches(sparsity)
    branches = [_new(layer, inputs, outputs, bias=False) for _ in range(count)]
    return Parallel(branches, [_new_norm(layer, outputs) if norm is None else copy.deepcopy(norm) for _ in range(count)])


# ---- the surgery -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformedLayer:
    """What stands where a dense layer stood.

    Attributes:
        name: Of the dense layer.
        dense_shape: Of its weight.
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
        uv_layer: Of Factorized.
        sparse_u_only: Of Factorized.
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

        def named(names: Sequence[str], prefix: str = prefix) -> tuple[str, ...]:
            return tuple(prefix + name for name in names)

        layers = tuple(
            replace(one, name=prefix + one.name, sparse=named(one.sparse), dense=named(one.dense), folded=named(one.folded))
            for one in mine.layers
        )
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
        uv_layer: See :func:`factorize`.
        sparse_u_only: See :func:`factorize`.
        init: Of the new weights: ``kaiming_normal`` by fan-out for ReLU, biases 0; ``default``: torch's own. Norms start as the dense
            network's do.
        zero_init_last: Start the scale of the last norm of each residual block (``conv1``, ``bn1``, ``conv2``, ``bn2``, ...) at 0.
        seed: Of the new weights.

    Returns:
        What was done; :func:`transformation_of` finds it again.

    Raises:
        ValueError: Something can't be transformed; the message says what and why. The module is then unchanged.
    """
    base_scaling(sparsity)
    for name, value, known in (("family", family, Family), ("uv_layer", uv_layer, UVLayer), ("init", init, Init)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}: give one of {', '.join(get_args(known))}")
    if transformation_of(module) is not None:
        raise ValueError(f"{type(module).__name__} is transformed already: transform a dense module")
    modules = {plain_name(name): plain_module(part) for name, part in module.named_modules()}
    matrices = [name for name, part in modules.items() if isinstance(part, (nn.Linear, _ConvNd))]
    if not matrices:
        raise ValueError(
            f"{type(module).__name__} has no linear layer or convolution: if it makes its layers later, call iso_flop_transform at the end "
            "of its configure_model"
        )
    ends = [matrices[0] if stem is None else stem, matrices[-1] if head is None else head]
    for argument, name in zip(("stem", "head"), ends, strict=True):
        if name not in matrices:
            raise ValueError(f"{argument} is {name!r}, no linear layer or convolution of {type(module).__name__}: {', '.join(matrices)}")
    for name in matrices:
        wanted = any(fnmatchcase(name, pattern) for pattern in targets) if targets else name not in ends
        if wanted and not any(fnmatchcase(name, pattern) for pattern in skip):
            _refuse(module, family, {name: _PARAMETRISED} if hasattr(modules[name], "parametrizations") else {})
    chosen = [name.rpartition(".")[0] for name in prunable_weights(module, targets, skip)]
    chosen = [name for name in dict.fromkeys(chosen) if targets or name not in ends]
    pointwise = {name for name in matrices if set(_sizes(modules[name])[2]) == {1} and any(fnmatchcase(name, p) for p in shortcuts)}
    masks_shortcuts = family in ("wide", "none") if sparse_shortcuts is None else sparse_shortcuts
    kept = [name for name in chosen if name in pointwise] if masks_shortcuts else []
    chosen = [name for name in chosen if name not in pointwise or masks_shortcuts]
    enlarged = [name for name in chosen if family in ("wide", "none") or name not in kept]
    if not enlarged:
        raise ValueError(
            f"{type(module).__name__} has no hidden layer to transform beside stem {ends[0]!r} and head {ends[1]!r}: name layers by targets"
        )
    last_norms = _last_norms(module) if zero_init_last else []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own_seed("SparseIFT", seed))  # the CPU's alone: others wouldn't be restored
        if family == "wide":
            layers = _widen(module, modules, chosen, ends, sparsity, init)
        else:
            layers = _replace(module, modules, family, chosen, set(enlarged), sparsity, uv_layer, sparse_u_only, init)
    for path in last_norms:
        _zero_scale(module, path)
    done = Transformation(family, sparsity, uv_layer, sparse_u_only, tuple(layers))
    setattr(plain_module(module), _MARK, done)
    return done


def _obstacle(layer: nn.Module, counts: Mapping[int, int]) -> str | None:
    """Why a layer can't get new weights."""
    if hasattr(layer, "parametrizations"):
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
        way = (
            "transform a submodule that it can, by network, or choose parallel, factorized or doped"
            if family == "wide"
            else "name other layers by targets, or leave it out by skip"
        )
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


def _replace(
    root: nn.Module,
    modules: dict[str, nn.Module],
    family: str,
    chosen: Sequence[str],
    enlarged: set[str],
    sparsity: float,
    uv_layer: UVLayer,
    sparse_u_only: bool,
    init: Init,
) -> list[TransformedLayer]:
    """Everything but Wide: layer by layer."""
    counts, problems = _uses(root), {}
    made: dict[str, nn.Module] = {}
    norms: dict[str, str] = {}
    for name in chosen if family != "none" else ():
        if name not in enlarged:
            continue
        layer, (parent, _) = modules[name], _parent(modules, name)
        why = _obstacle(layer, counts)
        if any(getattr(layer, kind, None) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
            why = "it has hooks, which would be lost: put SparseIFT before the callback that added them"
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(layer, nn.Linear):
            why = "torch's fast path of TransformerEncoderLayer reads the layer's weight"
        if why is None:
            try:
                if family == "parallel":
                    norm = _following_norm(modules, name)
                    made[name] = parallelize(layer, sparsity, None if norm is None else modules[norm])
                    if norm is not None:
                        norms[name] = norm
                elif family == "factorized":
                    made[name] = factorize(layer, sparsity, uv_layer, sparse_u_only)
                else:
                    made[name] = dope(layer, sparsity)
            except ValueError as error:
                why = str(error)
        if why is not None:
            problems[name] = why
    _refuse(root, family, problems)
    layers = []
    for name in chosen:
        shape = tuple(modules[name].weight.shape) if hasattr(modules[name], "weight") else ()  # type: ignore[arg-type]
        new = made.get(name)
        if new is None:
            own = [f"{name}.{key}" if name else key for key, value in modules[name].named_parameters(recurse=False) if value.ndim >= 2]
            for path in own:
                value = modules[name].get_parameter(path.rpartition(".")[2])
                layers.append(TransformedLayer(path.rpartition(".")[0], tuple(value.shape), (path,), enlarged=False))
            continue
        parts = [part for part in new.modules() if type(part) in _LAYERS]
        _initialise(parts, init)
        parent, child = _parent(modules, name)
        setattr(parent, child, new)
        if name in norms:
            setattr(*_parent(modules, norms[name]), nn.Identity())
        if isinstance(new, Parallel):
            layers.append(TransformedLayer(name, shape, tuple(f"{name}.branches.{j}.weight" for j in range(len(new.branches)))))
            continue
        u, v = f"{name}.u.weight", f"{name}.v.weight"
        if isinstance(new, Doped):
            layers.append(TransformedLayer(name, shape, (f"{name}.sparse.weight",), (u, v), folded=(u, v)))
        else:
            folded = (u, v) if uv_layer == "linear" else ()
            layers.append(TransformedLayer(name, shape, (u,) if sparse_u_only else (u, v), (v,) if sparse_u_only else (), folded=folded))
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
    wide = wide_width(base, sparsity)

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


def _resize(layer: nn.Module, inputs: int, outputs: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = inputs, outputs
    else:
        assert isinstance(layer, _ConvNd)
        layer.in_channels, layer.out_channels = inputs, outputs
    assert isinstance(layer.weight, Tensor)
    layer.weight = nn.Parameter(layer.weight.new_empty(outputs, inputs, *layer.weight.shape[2:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.weight.new_empty(outputs))


def _norm_width(norm: nn.Module) -> int:
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    return int(norm.normalized_shape[0]) if isinstance(norm, nn.LayerNorm) else int(norm.num_features)  # type: ignore[arg-type]


def _resize_norm(norm: nn.Module, width: int) -> None:
    if isinstance(norm, nn.GroupNorm):
        norm.num_channels = width
    elif isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (width,)
    else:
        assert isinstance(norm, _BatchNorm)
        norm.num_features = width
    for name, value, ordinary in [(name, getattr(norm, name), one) for name, one in (("weight", 1.0), ("bias", 0.0))]:
        if isinstance(value, Tensor):
            start = float(value.flatten()[0])
            same = bool((value == start).all())  # a start of 0 was meant so
            setattr(norm, name, nn.Parameter(value.new_full((width,), start if same else ordinary)))
    for name, ordinary in (("running_mean", 0.0), ("running_var", 1.0)):
        value = getattr(norm, name, None)
        if isinstance(value, Tensor):
            setattr(norm, name, value.new_full((width,), ordinary))


def _last_norms(root: nn.Module) -> list[str]:
    """Names of the last norms of residual blocks, which number their parts: conv1, bn1, conv2, bn2, ..."""
    found = []
    for name, part in root.named_modules():
        numbers = [int(key[2:]) for key in part._modules if re.fullmatch(r"bn\d+", key) and f"conv{key[2:]}" in part._modules]
        if len(numbers) > 1:
            found.append(f"{name}.{max(numbers)}" if name else str(max(numbers)))
    if not found:
        raise ValueError(f"zero_init_last finds no residual block with conv1, bn1, conv2, bn2 in {type(root).__name__}: set it to false")
    return found


def _zero_scale(root: nn.Module, path: str) -> None:
    block_name, _, number = path.rpartition(".")
    block = root.get_submodule(block_name)
    conv, norm = block.get_submodule(f"conv{number}"), block.get_submodule(f"bn{number}")
    for one in conv.norms if isinstance(conv, Parallel) and isinstance(norm, nn.Identity) else [norm]:
        nn.init.zeros_(one.weight)  # type: ignore[arg-type]


# ---- FLOPs -----------------------------------------------------------------------------------------------------------------------------


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
        layers: Of the module.
        macs: Name of a weight -> MACs that all its entries take part in, see
            :func:`~lit_methods.callbacks.sparsity.flops.count_macs`.
        sizes: Name -> number of entries.
        density: Name -> share of active entries; 1 for the others.

    Returns:
        For each layer (MACs now, MACs of the dense layer).
    """
    found = []
    for layer in layers:
        weights = (*layer.sparse, *layer.dense)
        uses = macs[weights[0]] / sizes[weights[0]]
        found.append((sum(macs[name] * density.get(name, 1.0) for name in weights), uses * layer.dense_size))
    return found


# ---- the callback ----------------------------------------------------------------------------------------------------------------------

_COUPLED = (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)


class SparseIFT(DynamicSparsity):
    """Makes hidden layers larger and sparse at equal FLOPs, before training, and trains them with static masks, SET or RigL.

    Members of the family, at sparsity s and B = 1 / (1 - s): ``wide``: hidden widths times sqrt(B); ``parallel``: B branches, each with a
    batch norm, summed; ``factorized``: V relu(BN(U x)); ``doped``: a sparse layer plus a dense one of low rank. ``none`` enlarges nothing:
    masks of the same layers, the baseline. See :func:`iso_flop_transform` for what can be transformed; the rest is refused.

    Runs: transforms the module in ``setup``, at every stage, before Lightning loads a checkpoint and before optimisers are made; layers
    that ``configure_model`` makes are made first. A module that is transformed already must be so in the same way. At the first training
    batch FLOPs are counted on one forward pass; all else as in :class:`DynamicSparsity`. The transformed module stays as it is after fit.
    Saves: what :class:`MaskCallback` saves, the settings, and which weights were ever and always active. A checkpoint fits the transformed
    module: load it with this callback, or into a module after :func:`iso_flop_transform`.
    Works as :class:`DynamicSparsity`. Lightning's ``WeightAveraging``, and callbacks that hook a transformed layer, must stand behind it.
    Logs: after each epoch ``sparse_ift/density``, ``sparse_ift/itop`` (share of masked weights that were ever active), ``sparse_ift/doc``
    (share that always was), ``sparse_ift/drop_fraction``, ``sparse_ift/flops_ratio`` (FLOPs of a forward pass, whole module, stem and head
    included, by those of the dense one), ``sparse_ift/flops_ratio_layers`` (the enlarged layers alone), ``sparse_ift/weights_ratio``
    (active weights of the enlarged layers by those of the dense ones), ``sparse_ift/stored_ratio`` (stored weights likewise),
    ``sparse_ift/spectral_gap``.

    Args:
        sparsity: s, share of removed weights in [0, 1); 0.5, 0.75 and 0.9 in the paper.
        family: ``wide``, ``parallel``, ``factorized``, ``doped`` or ``none``.
        method: ``static``, ``set`` or ``rigl``.
        network: Name of the submodule that is transformed, such as ``network``; null: the whole module.
        uv_layer: Between U and V of ``factorized``: ``linear``, ``nonlinear_norelu`` (batch norm) or ``nonlinear_relu`` (and ReLU).
        sparse_u_only: V of ``factorized`` stays dense.
        sparse_shortcuts: Mask pointwise shortcuts; null: for ``wide`` and ``none``. The other members mask them as they are.
        init: Of new weights: ``kaiming_normal`` by fan-out, or ``default``, torch's own.
        zero_init_last: Start the scale of the last norm of each residual block at 0.
        fold_weight_decay: Decay ||V U||^2 in place of U and V, where nothing stands between them; with SGD, Adam, RMSprop, Adagrad.
        measure_spectral_gap: Log the mean :func:`spectral_gap` of the masks after each epoch; one eigenvalue problem per layer.
        flops_tolerance: The enlarged layers may differ by so much from the dense ones' FLOPs, as a share, before training stops; tested
            at the first batch with uniform densities. Null: never.
        forward: Method of the module, ``(batch)``, that runs it once, to count FLOPs; null finds a step that does.
        distribution: Density of the layers: ``uniform``; ``er`` and ``erk``, whose FLOPs aren't equal; the plus variants keep the output
            layer at 0.2 or more, if targets name it.
        start: First masks: ``random``, each entry by itself; ``random_exact``; ``magnitude``.
        interval: Optimiser steps between two updates.
        drop_fraction: Share of the active weights that is replaced at the first updates, in [0, 1].
        anneal: ``cosine`` to 0 at the last update, ``constant``, or ``exponential``.
        rate: Of ``exponential``.
        begin: Updates come after this step.
        end_fraction: Updates end before this share of all optimiser steps.
        total_steps: All optimiser steps; null: ``trainer.estimated_stepping_batches``.
        stem: Name of the first layer below ``network``, which stays dense; null: the first linear layer or convolution.
        head: Name of the last one; likewise.
        targets: Patterns on names of layers below ``network``; empty: all but stem, head and shortcuts.
        skip: Patterns on names of layers that stay dense.
        seed: Of new weights and masks.
        mask_gradients: See :class:`MaskCallback`.
        mask_optimizer_state: See :class:`MaskCallback`.

    Raises:
        ValueError: An argument outside its range; in ``setup``, something that can't be transformed; at the first batch, unequal FLOPs.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "FLOPs against the dense network",
            ("sparse_ift/flops_ratio", "sparse_ift/flops_ratio_layers"),
            note="About 1. Above 1 for the whole network under wide: stem and head are dense and wider.",
        ),
        Curve(
            "Exploration of the larger layers",
            ("sparse_ift/itop", "sparse_ift/doc", "sparse_ift/density"),
            note="Share of weights ever active (ITOP), always active (DOC), active now. Equal and constant for static masks.",
        ),
        Curve("Drop fraction", ("sparse_ift/drop_fraction",), note="Share of the active weights that an update replaces."),
        Curve("Mean spectral gap of the masks", ("sparse_ift/spectral_gap",), note="Ramanujan bound - second singular value."),
        TablePanel("Iso-FLOP layers", "sparse_ift/layers", note="Active weights equal the dense layer's; stored ones are more."),
    )

    def __init__(
        self,
        sparsity: float,
        family: Family = "wide",
        method: Literal["static", "set", "rigl"] = "rigl",
        network: str | None = None,
        uv_layer: UVLayer = "nonlinear_relu",
        sparse_u_only: bool = False,
        sparse_shortcuts: bool | None = None,
        init: Init = "kaiming_normal",
        zero_init_last: bool = False,
        fold_weight_decay: bool = False,
        measure_spectral_gap: bool = False,
        flops_tolerance: float | None = 0.05,
        forward: str | None = None,
        distribution: Distribution = "uniform",
        start: Literal["random", "random_exact", "magnitude"] = "random",
        interval: int = 100,
        drop_fraction: float = 0.3,
        anneal: Literal["cosine", "constant", "exponential"] = "cosine",
        rate: float = 3.0,
        begin: int = 0,
        end_fraction: float = 0.75,
        total_steps: int | None = None,
        stem: str | None = None,
        head: str | None = None,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        base_scaling(sparsity)
        super().__init__(
            1 - sparsity,
            method,
            "uniform",
            start,
            interval,
            drop_fraction,
            anneal,
            rate,
            begin,
            end_fraction,
            total_steps,
            targets,
            skip,
            seed,
            mask_gradients,
            mask_optimizer_state,
        )
        choices: tuple[tuple[str, str, Any], ...] = (
            ("family", family, Family),
            ("uv_layer", uv_layer, UVLayer),
            ("distribution", distribution, Distribution),
            ("init", init, Init),
        )
        for name, value, known in choices:
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(get_args(known))}")
        if fold_weight_decay and not (family == "doped" or (family == "factorized" and uv_layer == "linear")):
            raise ValueError(
                f"fold_weight_decay needs a linear map V U, which family={family!r} with uv_layer={uv_layer!r} hasn't: "
                "choose doped, or factorized with uv_layer='linear'"
            )
        if flops_tolerance is not None and flops_tolerance < 0:
            raise ValueError(f"flops_tolerance is {flops_tolerance}: give a share of 0 or more, or null")
        self.sparsity, self.family, self.network = sparsity, family, network
        self.uv_layer, self.sparse_u_only, self.sparse_shortcuts, self.init = uv_layer, sparse_u_only, sparse_shortcuts, init
        self.zero_init_last, self.fold_weight_decay, self.measure_spectral_gap = zero_init_last, fold_weight_decay, measure_spectral_gap
        self.flops_tolerance, self.forward, self.stem, self.head = flops_tolerance, forward, stem, head
        self.layer_rule: Distribution = distribution
        self.transformation: Transformation | None = None
        self._macs: dict[str, Any] | None = None  # per_weight, other
        self._uncounted = True
        self._stored: dict[str, int] = {}  # entries of the weights of all transformed layers
        self._ever: dict[str, Tensor] = {}
        self._always: dict[str, Tensor] = {}
        self._restored: dict[str, Any] | None = None

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        return replace(super().sparsity_card, layerwise="er" if self.layer_rule == "er_plus" else self.layer_rule)

    # ---- the transformation ------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Transform the module, unless it is; then choose the masked weights.

        Raises:
            ValueError: The module, or another callback, doesn't allow it.
        """
        if stage == "fit":
            refuse_sharded(trainer, type(self).__name__)
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # Lightning calls it again, and says that it must do nothing then
        done = transformation_of(pl_module)
        if done is None:
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(other, WeightAveraging) and other._average_model is not None:
                    raise ValueError(
                        f"{type(other).__name__} has copied the dense module: put SparseIFT before it in the list of callbacks"
                    )
            iso_flop_transform(
                self._root(pl_module),
                self.family,
                self.sparsity,
                targets=self.targets,
                skip=self.skip,
                stem=self.stem,
                head=self.head,
                sparse_shortcuts=self.sparse_shortcuts,
                uv_layer=self.uv_layer,
                sparse_u_only=self.sparse_u_only,
                init=self.init,
                zero_init_last=self.zero_init_last,
                seed=self.seed,
            )
            done = transformation_of(pl_module)
        assert done is not None
        self._agree(done.settings(), f"{type(pl_module).__name__} is transformed already")
        self.transformation = done
        super().setup(trainer, pl_module, stage)

    def _root(self, pl_module: pl.LightningModule) -> nn.Module:
        if self.network is None:
            return pl_module
        modules = {plain_name(name): part for name, part in pl_module.named_modules()}
        if self.network not in modules:
            known = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"network is {self.network!r}, no submodule of {type(pl_module).__name__}: give one such as {known}, or null")
        return plain_module(modules[self.network])

    def _agree(self, settings: Mapping[str, Any], where: str) -> None:
        own = Transformation(self.family, self.sparsity, self.uv_layer, self.sparse_u_only, ()).settings()
        if dict(settings) != own:
            raise ValueError(f"{where}, with {dict(settings)}; this callback has {own}: use the same settings")

    def chosen(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """The masked weights of the transformed layers, by name; none before ``setup``."""
        if self.transformation is None:
            return {}
        parameters = {plain_name(name): parameter for name, parameter in pl_module.named_parameters()}
        names = [name for layer in self.transformation.layers for name in layer.sparse]
        missing = [name for name in names if name not in parameters]
        if missing:
            raise ValueError(
                f"{missing[0]} is gone: {type(pl_module).__name__} has made its layers anew after setup. Let configure_model do nothing "
                "when the layers are there"
            )
        return {name: parameters[name] for name in names}

    # ---- masks -------------------------------------------------------------------------------------------------------------------------

    def densities(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Density of each weight; the plus variants cap the sparsity of the output layer at 0.8."""
        base: Any = self.layer_rule.removesuffix("_plus")
        found = dict(zip(weights, layer_density([weight.shape for weight in weights.values()], self.density, base), strict=True))
        if self.layer_rule.endswith("_plus"):
            for name in self._output_weights():
                if name in found:
                    found[name] = max(found[name], 0.2)
        return found

    def _output_weights(self) -> tuple[str, ...]:
        """Of the layer that ``head`` names, or else of the last transformed one, if targets name layers themselves."""
        assert self.transformation is not None
        layers = self.transformation.layers
        prefix = f"{self.network}." if self.network else ""
        if self.head is not None:
            return next((layer.sparse for layer in layers if layer.name == prefix + self.head), ())
        return layers[-1].sparse if self.targets else ()

    def counts(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Active entries after an update, as the authors' code counts them."""
        return {name: target_count(weight.numel(), 1 - self.layer_densities[name]) for name, weight in weights.items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the masks, and begin to watch them."""
        super().on_fit_start(trainer, pl_module)
        assert self.store is not None
        if self._restored is not None:
            devices = {name: mask.device for name, mask in self.store.masks.items()}
            self._ever = {name: mask.to(devices[name]) for name, mask in self._restored["ever"].items()}
            self._always = {name: mask.to(devices[name]) for name, mask in self._restored["always"].items()}
            self._macs, self._restored = self._restored["macs"], None
        else:
            self._macs = None
            self._ever, self._always = union({}, self.store.masks), intersection({}, self.store.masks)
        self._uncounted = self._macs is None
        sizes = {plain_name(name): parameter.numel() for name, parameter in pl_module.named_parameters()}
        assert self.transformation is not None
        self._stored = {name: sizes[name] for layer in self.transformation.layers for name in (*layer.sparse, *layer.dense)}
        if self.fold_weight_decay:
            self._check_decay(trainer)

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop and grow in every layer, and remember what was active."""
        changed = super().after_step(step, names, gradients)
        self._ever |= union(self._ever, changed)
        self._always |= intersection(self._always, changed)
        return changed

    # ---- folded weight decay -----------------------------------------------------------------------------------------------------------

    def _check_decay(self, trainer: pl.Trainer) -> None:
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, _COUPLED) or optimizer.defaults.get("decoupled_weight_decay"):
                known = ", ".join(kind.__name__ for kind in _COUPLED)
                raise ValueError(
                    f"fold_weight_decay replaces a weight decay that joins the gradient ({known}), but {type(optimizer).__name__} decays "
                    "weights by itself: take one of these, or fold_weight_decay=false"
                )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Put the decay of the folded matrices into the gradients; then as all mask callbacks."""
        if self.fold_weight_decay and self.store is not None:
            self._fold(pl_module, optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _fold(self, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        assert self.transformation is not None
        decay = {id(p): float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups for p in group["params"]}
        parameters = {plain_name(name): parameter for name, parameter in pl_module.named_parameters()}
        for layer in self.transformation.layers:
            pair = [parameters[name] for name in layer.folded]
            if not pair or any(decay.get(id(one), 0.0) == 0 or one.grad is None for one in pair):
                continue
            u, v = pair
            with torch.enable_grad():
                penalty = 0.5 * decay[id(u)] * folded_frobenius(u, v)
            for one, grad in zip(pair, torch.autograd.grad(penalty, pair), strict=True):
                assert one.grad is not None
                one.grad.add_(grad.to(one.grad.dtype)).sub_(decay[id(one)] * one.detach())  # the optimiser will add the last term again

    # ---- FLOPs -------------------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first batch, count FLOPs and compare them with the dense network's.

        Raises:
            ValueError: They differ by more than ``flops_tolerance``, or a widened network can't run.
        """
        if not self._uncounted:
            return
        self._uncounted = False
        macs, _, problems = count_on_batch(trainer, pl_module, batch, self.forward)
        if macs is None:
            why = "; ".join(" ".join(problem.split())[:300] for problem in problems)
            if self.family == "wide" and self.flops_tolerance is not None:
                raise ValueError(
                    f"the widened {type(pl_module).__name__} can't run on a training batch ({why}). If its forward counts on widths, give "
                    "it larger widths yourself and use DynamicSparsity; if no step can run on a copy, set flops_tolerance to null"
                )
            rank_zero_warn(f"SparseIFT can't count FLOPs, so they aren't compared with the dense network's ({why})")
            return
        self._macs = {"per_weight": macs.per_weight, "other": macs.other}
        now, before = self._layer_macs(self.layer_densities, enlarged=True)
        if self.family != "none" and self.flops_tolerance is not None and self.layer_rule == "uniform" and before:
            ratio = now / before
            if abs(ratio - 1) > self.flops_tolerance:
                raise ValueError(
                    f"Sparse-IFT {self.family!r} at sparsity {self.sparsity} gives the transformed layers {ratio:.3f} of the dense "
                    f"layers' FLOPs, not 1 within {self.flops_tolerance}: widths, branches and ranks are whole numbers, and these layers "
                    "are small or 1 / (1 - sparsity) isn't one. Choose another sparsity (0.5, 0.75, 0.9), or raise flops_tolerance"
                )

    def _layer_macs(self, density: Mapping[str, float], enlarged: bool = False) -> tuple[float, float]:
        """MACs of the transformed layers (or those of them that have grown sparse and larger), now and dense."""
        assert self.transformation is not None
        assert self.store is not None
        assert self._macs is not None
        layers = [one for one in self.transformation.layers if not enlarged or (one.enlarged and one.sparse)]
        found = flops_against_dense(layers, self._macs["per_weight"], self._stored, density)
        return sum(now for now, _ in found), sum(before for _, before in found)

    # ---- telling -----------------------------------------------------------------------------------------------------------------------

    def _values(self, trainer: pl.Trainer) -> dict[str, float]:
        """Everything that is logged, by name."""
        assert self.store is not None
        assert self.transformation is not None
        counts = self.store.counts()
        density = {name: active / size for name, (active, size) in counts.items()}
        layers = [one for one in self.transformation.layers if one.enlarged and one.sparse]
        values = {
            "density": sum(active for active, _ in counts.values()) / sum(size for _, size in counts.values()),
            "itop": itop_rate(self._ever)[0],
            "doc": itop_rate(self._always)[0],
        }
        if layers:
            dense = sum(one.dense_size for one in layers)
            sizes = self._stored
            stored = sum(sizes[name] for one in layers for name in (*one.sparse, *one.dense))
            active = sum(sizes[name] * density.get(name, 1.0) for one in layers for name in (*one.sparse, *one.dense))
            values |= {"weights_ratio": active / dense, "stored_ratio": stored / dense}
        if self.method != "static":
            end = int(self.end_fraction * (self.total_steps or 0))
            values["drop_fraction"] = self.fraction(min(max(trainer.global_step, self.begin), end)) if end > self.begin else 0.0
        if self._macs is not None:
            now, before = self._layer_macs(density)
            rest = sum(self._macs["per_weight"].values()) + self._macs["other"] - self._layer_macs({})[0]
            values["flops_ratio"] = (rest + now) / (rest + before)
            if layers:
                now, before = self._layer_macs(density, enlarged=True)
                values["flops_ratio_layers"] = now / before
        if self.measure_spectral_gap:
            gaps = torch.stack([spectral_gap(mask).cpu() for mask in self.store.masks.values()])
            values["spectral_gap"] = float(gaps.mean())
        return {f"sparse_ift/{name}": value for name, value in values.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log where things stand."""
        pl_module.log_dict(self._values(trainer), sync_dist=trainer.world_size > 1)

    def dashboard_media(self) -> dict[str, Media]:
        """Table of the transformed layers."""
        if self.store is None or self.transformation is None:
            return {}
        sizes, counts = self._stored, self.store.counts()
        ratios = [(0.0, 0.0)] * len(self.transformation.layers)
        if self._macs is not None:
            density = {name: active / size for name, (active, size) in counts.items()}
            ratios = flops_against_dense(self.transformation.layers, self._macs["per_weight"], sizes, density)
        rows = []
        for layer, (now, before) in zip(self.transformation.layers, ratios, strict=True):
            weights = (*layer.sparse, *layer.dense)
            active = sum(counts[name][0] if name in counts else sizes[name] for name in weights)
            shape = " x ".join(map(str, layer.dense_shape))
            stored = sum(sizes[name] for name in weights)
            kind, ratio = "sparse" if layer.sparse else "dense", now / before if before else None
            rows.append((layer.name, shape, layer.dense_size, stored, active, kind, ratio))
        heads = ("layer", "dense weight", "weights of the dense layer", "stored now", "active now", "kind", "FLOPs / dense")
        return {"sparse_ift/layers": TableMedia(heads, tuple(rows))}

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The masks."""
        return {} if self.store is None else {"sparse_ift_masks": self.store.masks}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What mask callbacks save, the settings, exploration and the FLOP count."""
        state = super().state_dict()
        if not state or self.transformation is None:
            return state
        return {
            **state,
            "settings": self.transformation.settings(),
            "ever": {name: mask.cpu() for name, mask in self._ever.items()},
            "always": {name: mask.cpu() for name, mask in self._always.items()},
            "macs": self._macs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until fit starts.

        Raises:
            ValueError: The checkpoint's module was transformed differently.
        """
        super().load_state_dict(state)
        if state:
            self._agree(state["settings"], "the checkpoint's module is transformed")
            self._restored = state
