"""Removing channels for good: which tensors share a channel, and cutting them out of the modules.

Who depends on whom is traced by Torch-Pruning (extra ``sparsity``), and every group of channels that it finds is tried on a copy of the
network before it is believed: the cut network must give what the whole one gives with those channels' batch-norm scale and shift at 0.
Cutting itself, and rebuilding a cut network from a checkpoint, need torch alone. What a group of residual branches agrees on is the rule of
MaskSparsity (arXiv:2201.06776; CASIA-IVA-Lab/MaskSparsity at 2827de4, netslim/prune.py, see tests/golden/data/masksparsity/README.md).
Left out: convolutions with groups other than depthwise ones, norms other than batch norm.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lit_methods.callbacks.batch import tensors_in
from lit_methods.callbacks.sparsity.masks import keep_largest
from lit_methods.callbacks.targets import plain_modules
from lit_methods.compiled import names_in, plain_names
from lit_methods.runs.checkpoints import check_readable

Side = Literal["in", "out"]
ChannelPlan = dict[str, dict[str, dict[str, Any]]]
"""Module -> ``in`` or ``out`` -> ``{"size": channels before, "kept": [indices that stay, rising]}``; plain types, fit for a checkpoint."""

Forward = Callable[[nn.Module, Any], Any]
_WIDTHS = {"in": ("in_channels", "in_features"), "out": ("out_channels", "out_features", "num_features", "num_channels", "num_parameters")}
PLAN_KEY = "channel_plan"
"""Where a checkpoint of a cut network holds its plan."""


@dataclass(frozen=True)
class Part:
    """Where the channels of a group lie in one dimension of one module: channel c at ``offset + c * block``, ``block`` entries of it.

    Attributes:
        module: Name.
        side: ``out``: what it computes (of norms and depthwise convolutions: all they have); ``in``: what it reads.
        size: Entries of that dimension.
        offset: Place of channel 0; above 0 behind a concatenation.
        block: Entries per channel; above 1 where a map of several pixels was flattened.
    """

    module: str
    side: Side
    size: int
    offset: int
    block: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together.

    Attributes:
        norms: Names of the batch norms; several, where a sum (residual connection) or a depthwise convolution ties them.
        channels: How many each of them has.
        parts: All places that a channel takes up.
        voters: Those of the norms that decide: a norm behind a depthwise convolution follows what comes in.
    """

    norms: tuple[str, ...]
    channels: int
    parts: tuple[Part, ...]
    voters: tuple[str, ...]

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ChannelGroup":
        """Undo ``dataclasses.asdict``, which checkpoints hold."""
        parts = tuple(Part(**part) for part in state["parts"])
        return cls(tuple(state["norms"]), state["channels"], parts, tuple(state["voters"]))


# ---- masks -----------------------------------------------------------------------------------------------------------------------------


def merge_keep_masks(keep: Tensor) -> Tensor:
    """One mask for the batch norms that feed one sum.

    The channels that most of them prune go first: of all numbers of votes i = L, L-1, ..., 1 the first counts for which at least as many
    channels have i votes or more as the least pruned member prunes.

    Args:
        keep: (L, C) bool, True: kept; L >= 1.

    Returns:
        (C,) bool. All False is possible, if the members disagree altogether.
    """
    prune = ~keep
    votes = prune.sum(0)
    least = prune.sum(1).min()
    levels = torch.arange(len(keep), 0, -1, device=keep.device)
    candidates = votes >= levels[:, None]
    return ~candidates[(candidates.sum(1) >= least).int().argmax()]


def agree(
    groups: Sequence[ChannelGroup], keep: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None, min_channels: int = 1
) -> dict[str, Tensor]:
    """Masks on which the members of each group agree.

    Args:
        groups: Groups of the network.
        keep: Norm -> (C,) bool; a norm that isn't there keeps all. Norms of no group are left out of the result.
        scores: Norm -> (C,), such as its scale: the largest sums of magnitudes stay where an agreement would leave too little; None: the
            first channels.
        min_channels: Channels that stay at least, or all if a layer has fewer.

    Returns:
        Norm -> (C,) bool, for all norms of all groups.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        for name in group.norms:
            mask = keep.get(name)
            if mask is not None and (mask.shape != (group.channels,) or mask.dtype != torch.bool):
                given = f"mask of {name!r} is {tuple(mask.shape)} {mask.dtype}, but the layer has {group.channels} channels"
                raise ValueError(f"{given}: give bools, made for this network as it is now (not before an earlier pruning)")
        whole = torch.ones(group.channels, dtype=torch.bool, device=next((keep[name].device for name in group.norms if name in keep), None))
        votes = [keep.get(name, whole) for name in group.voters]
        merged = merge_keep_masks(torch.stack(votes)) if len(votes) > 1 else votes[0]
        floor = min(min_channels, group.channels)
        if len(votes) > 1 and int(merged.sum()) < floor:
            score = torch.stack([scores[name].abs() for name in group.voters]).sum(0) if scores else whole.float()
            merged = keep_largest(score, floor)
        found |= dict.fromkeys(group.norms, merged)
    return found


# ---- tracing ---------------------------------------------------------------------------------------------------------------------------


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("finding out which channels belong together needs Torch-Pruning: pip install 'lit-methods[sparsity]'") from error
    return torch_pruning


def _runner(inputs: Any, forward: Forward | None) -> Callable[[nn.Module], list[Tensor]]:
    """Module -> the floating-point tensors that it makes of the inputs."""

    def run(module: nn.Module) -> list[Tensor]:
        if forward is not None:
            output = forward(module, inputs)
        elif isinstance(inputs, Mapping):
            output = module(**inputs)
        else:
            output = module(*inputs) if isinstance(inputs, list | tuple) else module(inputs)
        return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]

    return run


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Plain float32, no compiled code, and the generators of random numbers as they were afterwards."""
    with ExitStack() as stack:
        stack.enter_context(isolate_rng(torch.cuda.is_available()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def channel_groups(module: nn.Module, example_inputs: Any, forward: Forward | None = None) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The channels of a network that can be removed, and the batch norms that must be left alone.

    The module isn't changed. Every group is tried on a copy with other batch-norm weights and statistics: without every second channel, it
    must give the outputs of the whole copy with scale and shift of those channels at 0, in eval mode. What fails is left alone: a sum with
    something that no batch norm scales, an activation that doesn't map 0 to 0, a network output, a grouped convolution.

    Args:
        module: Any module with batch norms (1d, 2d, 3d), in any mode.
        example_inputs: What its forward takes: a tensor, a sequence of positional or a dictionary of named arguments. Four samples or so:
            more cost time only, and with a single one norms of one pixel can't be tried as well.
        forward: ``forward(module, example_inputs)`` in place of the module's own.

    Returns:
        Groups in the order of their first norm, and norm -> why it is left alone.

    Raises:
        ImportError: Torch-Pruning is missing.
        ValueError: There is no batch norm with scale and shift.
    """
    run = _runner(example_inputs, forward)
    twin, names, tied = _twin(module)
    norms = {name: norm for name, norm in plain_modules(twin).items() if isinstance(norm, _BatchNorm) and norm.affine}
    if not norms:
        raise ValueError(f"{type(module).__name__} has no batch norm with scale and shift: there are no channels to choose by them")
    groups: list[ChannelGroup] = []
    left: dict[str, str] = {}
    with _undisturbed(), torch.enable_grad():
        graph = _traced(twin, example_inputs, run)
        for name, norm in norms.items():
            if name in left or any(name in group.norms for group in groups):
                continue
            found = _group_of(name, norm, norm.num_features, graph, names, tied)
            if isinstance(found, ChannelGroup):
                groups.append(found)
            else:
                left |= {other: found[1] for other in {name, *found[0]}}
    groups = [group for group in groups if not left.keys() & set(group.norms)]
    with _undisturbed(), torch.no_grad():
        twin.requires_grad_(False)
        _shake(twin, run)
        for group in groups:
            every_second = dict.fromkeys(group.norms, torch.arange(group.channels) % 2 == 0)
            if why := differs(twin, every_second, make_plan([group], every_second), run):
                left |= dict.fromkeys(group.norms, why)
    return [group for group in groups if not left.keys() & set(group.norms)], left


def node_groups(module: nn.Module, example_inputs: Any, forward: Forward | None = None) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The hidden nodes of a network: outputs of linear layers and channels of convolutions that other such layers read.

    The module isn't changed. Every group is tried on a copy: with the weights of every second node masked by :func:`node_masks` it must
    give the outputs of the copy without these nodes, in eval mode. What fails stays whole: outputs of the network, what a layer norm or the
    heads of attention mix, grouped convolutions.

    Args:
        module: Any module, in any mode.
        example_inputs: What its forward takes: a tensor, a sequence of positional or a dictionary of named arguments.
        forward: ``forward(module, example_inputs)`` in place of the module's own.

    Returns:
        Groups in the order of their first layer, and layer -> why its nodes stay.

    Raises:
        ImportError: Torch-Pruning is missing.
    """
    run = _runner(example_inputs, forward)
    twin, names, tied = _twin(module)
    groups: list[ChannelGroup] = []
    left: dict[str, str] = {}
    layers = {name: layer for name, layer in plain_modules(twin).items() if isinstance(layer, nn.Linear | _ConvNd)}
    with _undisturbed(), torch.enable_grad():
        graph = _traced(twin, example_inputs, run) if layers else None
        for name, layer in layers.items():
            if is_depthwise(layer) or any(part.module == name and part.side == "out" for group in groups for part in group.parts):
                continue
            found = _group_of(name, layer, channel_counts(layer)["out"], graph, names, tied)
            if isinstance(found, ChannelGroup):
                groups.append(found)
            else:
                left[name] = found[1]
    with _undisturbed(), torch.no_grad():
        twin.requires_grad_(False)
        _shake(twin, run)
        for group in list(groups):
            removed = removed_entries([(group, torch.arange(group.channels) % 2 == 0)])
            masked = copy.deepcopy(twin)
            weights = dict(masked.named_parameters())
            for name, mask in node_masks(plain_modules(masked), removed).items():
                weights[name].data.mul_(mask.to(weights[name].device))
            if why := _otherwise(run(masked), twin, _plan_of(removed), run, 1e-5):
                groups.remove(group)
                left |= {part.module: why for part in group.parts if part.side == "out"}
    return groups, left


def _twin(module: nn.Module) -> tuple[nn.Module, dict[int, str], set[str]]:
    """A copy to trace, in float32 or wider and eval mode; id of each submodule -> name; names of those that share a parameter."""
    twin = copy.deepcopy(module).eval()
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in twin.parameters()):
        twin = twin.float()
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    owners: dict[int, set[str]] = {}
    for name, submodule in plain_modules(twin).items():
        for parameter in submodule.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    tied = set().union(*(several for several in owners.values() if len(several) > 1))
    return twin, {id(submodule): name for name, submodule in plain_modules(twin).items()}, tied


def _traced(twin: nn.Module, example_inputs: Any, run: Callable[[nn.Module], list[Tensor]]) -> Any:
    return _torch_pruning().DependencyGraph().build_dependency(twin, example_inputs, forward_fn=lambda net, _: run(net), verbose=False)


def _group_of(
    name: str, root: nn.Module, channels: int, graph: Any, names: Mapping[int, str], tied: set[str]
) -> ChannelGroup | tuple[set[str], str]:
    """The group that the outputs of a layer or norm belong to; or its norms and why it can't be cut."""
    if root not in graph.module2node:
        return {name}, "the forward pass doesn't use it"
    try:
        cut = graph.get_pruner_of_module(root).prune_out_channels
        members = graph.get_pruning_group(root, cut, list(range(channels)))
    except Exception as error:  # whatever a tracer stumbles over, the channels stay
        return {name}, f"it can't be traced ({type(error).__name__}: {error})"
    return _read(members, graph, names, channels, tied)


def _read(members: Any, graph: Any, names: Mapping[int, str], channels: int, tied: set[str]) -> ChannelGroup | tuple[set[str], str]:
    """A group as Torch-Pruning traced it; or its norms and why it can't be cut."""
    norms: list[str] = []
    followers: set[str] = set()
    parts: dict[tuple[str, Side], Part] = {}
    why = "it has a single channel" if channels < 2 else ""
    for item in members:
        target = item.dep.target.module
        name = names.get(id(target))
        if isinstance(target, nn.Parameter):
            why = why or "a parameter outside of layers stands on its channels"
            continue
        if name is None:  # an operation
            if type(target).__name__ == "_OutputOp":
                why = why or "its channels are an output of the network"
            continue
        if isinstance(target, nn.PReLU) and target.num_parameters == 1:
            continue
        counts = channel_counts(target)
        if not counts or (isinstance(target, _ConvNd) and target.groups != 1 and not is_depthwise(target)):
            kind = f"{type(target).__name__} with {target.groups} groups" if isinstance(target, _ConvNd) else type(target).__name__
            why = why or f"{name} ({kind}) stands on its channels and can't be cut"
            continue
        reads = "in" in counts and not is_depthwise(target) and not graph.is_out_channel_pruning_fn(item.dep.handler)
        side: Side = "in" if reads else "out"
        if isinstance(target, _BatchNorm) and target.affine:
            norms.append(name)
            feeding = graph.module2node[target].inputs
            followers |= {name} if len(feeding) == 1 and is_depthwise(feeding[0].module) else set()
        part = _part(name, side, counts[side], item.idxs, item.root_idxs, channels)
        if part is None or (isinstance(target, _BatchNorm) and (part.offset, part.block, part.size) != (0, 1, channels)):
            why = why or f"its channels are mixed with others in {name}"
        elif name in tied:
            why = why or f"{name} shares its weight with another layer"
        elif parametrize.is_parametrized(target):
            why = why or f"{name} is parametrised"
        else:
            parts[name, side] = part
    if why:
        return set(norms), why
    norms = list(dict.fromkeys(norms))
    voters = [name for name in norms if name not in followers] or norms
    return ChannelGroup(tuple(norms), channels, tuple(parts.values()), tuple(voters))


def is_depthwise(conv: nn.Module) -> bool:
    """One filter per channel; by ``groups``, as a grey first convolution has one input channel, too."""
    return isinstance(conv, _ConvNd) and conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def _part(name: str, side: Side, size: int, indices: Sequence[int], roots: Sequence[int], channels: int) -> Part | None:
    """The regular pattern that the indices follow, or None."""
    block = len(indices) // channels
    if len(indices) != channels * block or block == 0 or any(root is None for root in roots):
        return None
    ordered = sorted(zip(roots, indices, strict=True))
    offset = ordered[0][1]
    regular = ordered == [(c, offset + c * block + k) for c in range(channels) for k in range(block)]
    return Part(name, side, size, offset, block) if regular and offset + channels * block <= size else None


def _shake(twin: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Other weights and statistics for all batch norms, so that every channel matters; the signal keeps its size from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    norms = [norm for norm in twin.modules() if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        draws = torch.rand(2, norm.num_features, generator=generator)
        if norm.affine:
            norm.weight.copy_(draws[0] + 0.5)
            norm.bias.copy_(draws[1])
        norm.momentum = 1.0
        norm.train()
    with contextlib.suppress(ValueError):  # a single value per channel has no variance: such statistics stay
        run(twin)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def differs(module: nn.Module, keep: Mapping[str, Tensor], plan: ChannelPlan, run: Callable[[nn.Module], list[Tensor]]) -> str:
    """How the outputs of a cut module differ from its own with scale and shift of removed channels at 0; "" if they don't.

    Args:
        module: In eval mode; copies of it are run.
        keep: Norm -> (C,) bool.
        plan: Plan of those masks.
        run: Module -> its outputs. Gradients must be off.
    """
    masked = copy.deepcopy(module)
    named: dict[str, Any] = dict(plain_modules(masked))
    for name, mask in keep.items():
        for value in (named[name].weight, named[name].bias):
            value.data.masked_fill_(~mask.to(value.device), 0.0)
    return _otherwise(run(masked), module, plan, run)


def _otherwise(
    expected: list[Tensor], module: nn.Module, plan: ChannelPlan, run: Callable[[nn.Module], list[Tensor]], tolerance: float = 1e-4
) -> str:
    """How the outputs of a copy that is cut by a plan differ from the expected ones, by more than a share of them; "" if they don't."""
    smaller = copy.deepcopy(module)
    try:
        apply_plan(smaller, plan)
        found = run(smaller)
    except Exception as error:
        return f"without some of its channels the network doesn't run ({(str(error) or type(error).__name__).splitlines()[0]})"
    if [one.shape for one in found] != [one.shape for one in expected]:
        return "its channels are an output of the network"
    for one, other in zip(found, expected, strict=True):
        error_size, size = float((one - other).abs().max()), float(other.abs().max())
        if not error_size <= tolerance * size + 1e-7:
            return (
                f"cutting its channels isn't the same as setting them to 0 (outputs up to {size:.3g} differ by {error_size:.3g}): "
                "something without a batch norm is added to them, or something behind them doesn't map 0 to 0"
            )
    return ""


# ---- the plan --------------------------------------------------------------------------------------------------------------------------


def make_plan(groups: Sequence[ChannelGroup], keep: Mapping[str, Tensor]) -> ChannelPlan:
    """What is left of each module.

    Args:
        groups: Groups of the network.
        keep: Norm -> (C,) bool, the same for all norms of a group, as from :func:`agree`; groups whose norms aren't there stay whole.

    Returns:
        The plan; modules of which nothing is removed aren't in it.

    Raises:
        ValueError: The norms of a group disagree, or a mask has another size or keeps nothing.
    """
    chosen: list[tuple[ChannelGroup, Tensor]] = []
    for group in groups:
        masks = [keep[name].cpu() for name in group.norms if name in keep]
        if not masks:
            continue
        if len(masks) < len(group.norms) or any(not torch.equal(mask, masks[0]) for mask in masks):
            raise ValueError(f"{', '.join(group.norms)} are tied and need one mask: merge theirs with agree()")
        if masks[0].shape != (group.channels,) or not masks[0].any():
            kept = f"keeps {int(masks[0].sum())} of {len(masks[0])} channels where the layer has {group.channels}"
            raise ValueError(f"mask of {group.norms[0]!r} {kept}: give one bool a channel, at least one True")
        chosen.append((group, masks[0]))
    return _plan_of(removed_entries(chosen))


def removed_entries(chosen: Iterable[tuple[ChannelGroup, Tensor]]) -> dict[tuple[str, Side], Tensor]:
    """Groups with their masks, (C,) bool, True: kept -> what goes of each side of each module: (size,) bool, True: removed."""
    removed: dict[tuple[str, Side], Tensor] = {}
    for group, keep in chosen:
        for part in group.parts if not keep.all() else ():
            gone = removed.setdefault((part.module, part.side), torch.zeros(part.size, dtype=torch.bool))
            gone[part.offset : part.offset + group.channels * part.block] |= ~keep.repeat_interleave(part.block)
    return removed


def _plan_of(removed: Mapping[tuple[str, Side], Tensor]) -> ChannelPlan:
    plan: ChannelPlan = {}
    for (name, side), gone in removed.items():
        plan.setdefault(name, {})[side] = {"size": len(gone), "kept": (~gone).nonzero()[:, 0].tolist()}
    return plan


def node_masks(modules: Mapping[str, nn.Module], removed: Mapping[tuple[str, Side], Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that take nodes away: rows of the layers that compute them, columns of those that read them.

    Biases and norms of removed nodes may stay, as nobody reads them any more.

    Args:
        modules: Name -> module, of all that are cut.
        removed: As from :func:`removed_entries`.

    Returns:
        Name of the weight -> bool mask, its shape, on the CPU; of linear layers and convolutions that lose something.
    """
    masks: dict[str, Tensor] = {}
    for (name, side), gone in removed.items():
        layer = modules[name]
        if not isinstance(layer, nn.Linear | _ConvNd):
            continue
        turned = isinstance(layer, _ConvTransposeNd) and not is_depthwise(layer)
        dim = int((side == "in") != turned)
        weight = f"{name}.weight" if name else "weight"
        mask = masks.setdefault(weight, torch.ones(layer.weight.shape, dtype=torch.bool))
        mask &= ~gone.view(-1, *[1] * (mask.ndim - 1 - dim))
    return masks


def compose(first: ChannelPlan, second: ChannelPlan) -> ChannelPlan:
    """The plan of a network that was cut by ``first`` and then by ``second``."""
    plan = copy.deepcopy(first)
    for name, sides in second.items():
        for side, cut in sides.items():
            old = plan.get(name, {}).get(side)
            kept = cut["kept"] if old is None else [old["kept"][index] for index in cut["kept"]]
            plan.setdefault(name, {})[side] = {"size": cut["size"] if old is None else old["size"], "kept": kept}
    return plan


def channel_counts(module: nn.Module) -> dict[str, int]:
    """Width of a layer on each side, of the kinds that can be cut: ``in`` and ``out``; {} for others."""
    if not isinstance(module, _ConvNd | nn.Linear | _BatchNorm | nn.PReLU):
        return {}
    return {side: vars(module)[name] for side, names in _WIDTHS.items() for name in names if name in vars(module)}


def apply_plan(module: nn.Module, plan: ChannelPlan) -> None:
    """Cut the modules, in place: smaller parameters, buffers and width attributes.

    Parameters are new objects without a gradient: make optimisers afterwards.

    Args:
        module: The network that the plan was made for, or a fresh one of the same architecture.
        plan: As from :func:`make_plan`.

    Raises:
        ValueError: It is another architecture; nothing is changed then.
    """
    named = plain_modules(module)
    for name, sides in plan.items():
        there = channel_counts(named[name]) if name in named else {}
        for side, cut in sides.items():
            if there.get(side) != cut["size"]:
                found = f"has {there[side]} there" if side in there else "has no such layer"
                planned = f"the channel plan is for a network whose {name!r} has {cut['size']} {side}put channels"
                raise ValueError(f"{planned}, but {type(module).__name__} {found}: build the module as it was before pruning")
    for name, sides in plan.items():
        layer = named[name]
        kept = {side: torch.tensor(cut["kept"], dtype=torch.int64) for side, cut in sides.items()}
        if is_depthwise(layer):
            _select(layer, ("weight", "bias"), 0, kept["out"])
            layer.in_channels = layer.out_channels = layer.groups = len(kept["out"])  # type: ignore[assignment]
            continue
        out_dim = 1 if isinstance(layer, _ConvTransposeNd) else 0
        if "out" in kept:
            _select(layer, ("weight",), out_dim, kept["out"])
            _select(layer, ("bias", "running_mean", "running_var"), 0, kept["out"])
        if "in" in kept:
            _select(layer, ("weight",), 1 - out_dim, kept["in"])
        set_widths(layer, {side: len(indices) for side, indices in kept.items()})


def set_widths(layer: nn.Module, widths: Mapping[str, int]) -> None:
    """Let a layer know its new widths, ``in`` and ``out``; its tensors are the caller's business."""
    for side, width in widths.items():
        for attribute in _WIDTHS[side]:
            if attribute in vars(layer):
                setattr(layer, attribute, width)


@torch.no_grad()
def _select(layer: nn.Module, attributes: Sequence[str], dim: int, kept: Tensor) -> None:
    for attribute in attributes:
        old = getattr(layer, attribute, None)
        if isinstance(old, Tensor):
            new = old.detach().index_select(dim, kept.to(old.device)).clone()
            setattr(layer, attribute, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def prune_channels(
    module: nn.Module, keep: Mapping[str, Tensor], example_inputs: Any, forward: Forward | None = None, min_channels: int = 1
) -> ChannelPlan:
    """Remove channels from a network for good, in place: a smaller dense network, with the outputs of the masked one.

    Before the module is touched, a cut copy is compared with the whole network whose removed channels have scale and shift 0, in eval mode.
    The constant that a removed channel would still give (of its shift) is discarded, as in the paper.

    Args:
        module: Any module with batch norms.
        keep: Name of the batch norm (or of its weight) -> (C,) bool, True: stays. A norm that isn't there keeps all its channels. Norms
            whose outputs are summed get one mask, see :func:`merge_keep_masks`. Norms that must be left alone are, with a warning.
        example_inputs: What its forward takes: a tensor, a sequence of positional or a dictionary of named arguments.
        forward: ``forward(module, example_inputs)`` in place of the module's own.
        min_channels: Channels that stay in a summed group at least.

    Returns:
        The plan: with it, :func:`apply_plan` makes the same shapes out of a fresh module.

    Raises:
        ImportError: Torch-Pruning is missing.
        ValueError: A name of no batch norm, a mask of the wrong size.
        RuntimeError: The cut network isn't the masked one; the module is as it was.
    """
    masks = {name.removesuffix(".weight"): mask.detach().cpu() for name, mask in keep.items()}
    named = plain_modules(module)
    for name in masks:
        if not isinstance(named.get(name), _BatchNorm):
            known = ", ".join(other for other, norm in named.items() if isinstance(norm, _BatchNorm))
            raise ValueError(f"keep has {name!r}, which is no batch norm of {type(module).__name__}: it has {known or 'none'}")
    groups, left = channel_groups(module, example_inputs, forward)
    if alone := [name for name, mask in masks.items() if name in left and not mask.all()]:
        warnings.warn("left alone: " + "; ".join(f"{name}: {left[name]}" for name in alone), stacklevel=2)
    agreed = agree(groups, masks, min_channels=min_channels)
    plan = make_plan(groups, agreed)
    twin = copy.deepcopy(module).eval()
    with _undisturbed(), torch.no_grad():
        if why := differs(twin, agreed, plan, _runner(example_inputs, forward)):
            raise RuntimeError(f"the network was not cut: {why}")
    apply_plan(module, plan)
    return plan


# ---- cut networks from files -----------------------------------------------------------------------------------------------------------


def plan_from_shapes(module: nn.Module, state: Mapping[str, Tensor]) -> ChannelPlan:
    """The plan that gives ``module`` the widths of a state dict: which channels were kept isn't known, so they are the first ones.

    Good for loading that state dict, and for nothing else.
    """
    plan: ChannelPlan = {}
    state = plain_names(state)
    for name, layer in plain_modules(module).items():
        counts, weight = channel_counts(layer), state.get(f"{name}.weight" if name else "weight")
        if not counts or weight is None:
            continue
        out_dim = 1 if isinstance(layer, _ConvTransposeNd) else 0
        sizes = {"out": weight.shape[0 if is_depthwise(layer) else out_dim]}
        if "in" in counts and weight.ndim > 1 and not is_depthwise(layer):
            sizes["in"] = weight.shape[1 - out_dim] * (layer.groups if isinstance(layer, _ConvNd) else 1)
        for side, size in sizes.items():
            if size < counts[side]:
                plan.setdefault(name, {})[side] = {"size": counts[side], "kept": list(range(size))}
    return plan


def load_pruned(module: nn.Module, path: Path | str, prefix: str = "") -> ChannelPlan:
    """Load the checkpoint of a cut network into a fresh module of the original architecture, which is cut first, in place.

    Args:
        module: As it was before pruning.
        path: A Trainer's checkpoint, or a plain state dict (``lit export``), whose shapes then tell the widths.
        prefix: What stands before the module's names in the file: ``network.`` to load the network of a LightningModule alone.

    Returns:
        The plan that was applied; {} for a network that is whole.

    Raises:
        ValueError: The file belongs to another architecture.
    """
    content = check_readable(path)
    state = plain_names(content.get("state_dict", content))
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    plan = content.get(PLAN_KEY)
    if plan is None:
        plan = plan_from_shapes(module, state)
    else:
        plan = {name.removeprefix(prefix): sides for name, sides in plan.items() if name.startswith(prefix)}
    apply_plan(module, plan)
    load_state(module, state, path)
    return plan


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """``module.load_state_dict`` with an error that names the file; either may be of a compiled network.

    Raises:
        ValueError: Names or shapes differ.
    """
    try:
        module.load_state_dict(names_in(module, state))
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(f"{path} holds weights of another architecture than {type(module).__name__}: {reasons}") from error
