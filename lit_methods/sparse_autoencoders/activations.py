"""What turns pre-activations into codes: each a pure function, found by name.

A function takes pre-activations u (B, h), and whatever else it names, as keywords:

| name | what |
|---|---|
| ``projection`` | (B, h), u without the encoder's bias |
| ``x`` | (B, d), the input, normalised |
| ``centred`` | (B, d), the input minus the decoder's bias |
| ``decoder_norms`` | (h,), L2 norm of each feature's direction |
| ``log_threshold``, ``log_scale``, ``magnitude_bias`` | (h,), learned; made for functions that name them, 0 at the start |
| anything else | a setting, such as ``k``: ``settings: {k: 32}`` |

It returns the code, (B, h) or a :class:`~lit_methods.sparse_autoencoders.dictionary.SparseCode`. A function of one's own is named by its
dotted path. Penalties work in the same way; their first argument is the code (B, h), and they may name ``u``, ``reconstruction``,
``decoder``, ``decoder_bias``, and entries of the batch, too.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_methods import checks
from lit_methods.sparse_autoencoders.dictionary import SparseCode, keep_entries, wide

LEARNED = ("log_threshold", "log_scale", "magnitude_bias")  # vectors (h,) that a module learns for functions that name them
EncoderBias = Literal["none", "learned", "fixed"]


def keep_largest(u: Tensor, scores: Tensor, k: int, per_batch: bool = False) -> SparseCode:
    """The entries of ``u`` with the largest scores; the choice itself has no gradient.

    Args:
        u: (B, h) floating point.
        scores: (B, h); compared in float32 or wider. Which of equal ones are kept isn't specified.
        k: Entries kept of each sample, >= 1; h or more keep all.
        per_batch: Keep k B of the whole batch instead, however many of each sample.
    """
    checks.at_least(1, "entries", k=k)
    batch, features = u.shape
    kept, found = min(k, features), wide(scores.detach())
    if per_batch:
        flat = found.flatten().topk(kept * batch, sorted=False).indices.sort().values
        return keep_entries(u, flat // features, flat % features)
    columns = found.topk(kept, dim=1, sorted=False).indices
    rows = torch.arange(batch, device=u.device).repeat_interleave(kept)
    return keep_entries(u, rows, columns.flatten())


def relu(u: Tensor) -> Tensor:
    """max(u, 0)."""
    return u.relu()


def topk(u: Tensor, k: int) -> SparseCode:
    """The k largest of max(u, 0) of each sample (arXiv:2406.04093): fewer where fewer are positive."""
    code = keep_largest(u, u, k)
    return code._replace(values=code.values.relu())


def raw_topk(u: Tensor, k: int) -> SparseCode:
    """The k largest of u of each sample, negative ones too, as amakelov/sae has it: k entries always."""
    return keep_largest(u, u, k)


def batchtopk(u: Tensor, k: int) -> SparseCode:
    """The k B largest of max(u, 0) of the whole batch (arXiv:2412.06410): a sample may get more than k or fewer."""
    code = keep_largest(u, u, k, per_batch=True)
    return code._replace(values=code.values.relu())


def abstopk(u: Tensor, k: int, per_batch: bool = False) -> SparseCode:
    """The k entries of largest magnitude of each sample, with their signs (arXiv:2510.00404); ``per_batch``: k B of the batch."""
    return keep_largest(u, u.abs(), k, per_batch)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, log_threshold: Tensor, bandwidth: float) -> Tensor:  # type: ignore[override]
        threshold = log_threshold.exp()
        ctx.save_for_backward(a, threshold)
        ctx.bandwidth = bandwidth
        return a * (a > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        a, threshold = ctx.saved_tensors
        near = ((a - threshold).abs() < ctx.bandwidth / 2).to(grad.dtype)
        return grad * (a > threshold), (-(threshold / ctx.bandwidth) * near * grad).sum(0).to(threshold.dtype), None


class _Above(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, code: Tensor, log_threshold: Tensor, bandwidth: float) -> Tensor:  # type: ignore[override]
        threshold = log_threshold.exp()
        ctx.save_for_backward(code, threshold)
        ctx.bandwidth = bandwidth
        return (code > threshold).to(code.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        code, threshold = ctx.saved_tensors
        near = ((code - threshold).abs() < ctx.bandwidth / 2).to(grad.dtype)
        return None, (-near / ctx.bandwidth * grad).sum(0).to(threshold.dtype), None


def jumprelu(u: Tensor, log_threshold: Tensor, bandwidth: float = 0.001) -> Tensor:
    """max(u, 0) where it is above exp(log_threshold), else 0 (arXiv:2407.14435), with a straight-through gradient for the threshold.

    Follows BatchTopK's code: a ReLU stands in front, and the gradient for log_threshold is -(threshold / bandwidth) within half a
    ``bandwidth`` of the threshold; the chain rule would have the threshold squared.

    Args:
        u: (B, h).
        log_threshold: (h,).
        bandwidth: Width of the rectangle, > 0, in units of u.
    """
    checks.positive(bandwidth=bandwidth)
    return _JumpReLU.apply(u.relu(), log_threshold.to(u.dtype), bandwidth)  # type: ignore[no-any-return]


def gated(u: Tensor, projection: Tensor, log_scale: Tensor, magnitude_bias: Tensor, rectified: bool = False) -> Tensor:
    """Gate and magnitude apart (arXiv:2404.16014): 1[u > 0] (projection exp(log_scale) + magnitude_bias).

    The magnitude has no ReLU of its own, as in amakelov/sae; the paper and sae-lens have one, as ``rectified`` does. The gate gets its
    gradient from the penalties ``gate_l1`` and ``gate_reconstruction``.

    Args:
        u: (B, h), the gate's pre-activations, with its bias.
        projection: (B, h), the same without.
        log_scale: (h,).
        magnitude_bias: (h,).
        rectified: Magnitudes below 0 are 0.
    """
    magnitude = projection * log_scale.exp() + magnitude_bias
    return (u > 0) * (magnitude.relu() if rectified else magnitude)


def gba(u: Tensor, projection: Tensor, jump: bool = True) -> Tensor:
    """Codes of bias adaptation (arXiv:2506.14002): the bias decides who is active, and ``GroupBiasAdaptation`` sets it.

    Args:
        u: (B, h) with the bias.
        projection: (B, h) without.
        jump: True: the projection where u > 0, whose magnitude the bias doesn't change. False: max(u, 0).
    """
    return projection * (u > 0) if jump else u.relu()


def l1(code: Tensor) -> Tensor:
    """Mean over the batch of the sum of |z|."""
    return wide(code).abs().sum(dim=1).mean()


def l0(code: Tensor, log_threshold: Tensor, bandwidth: float = 0.001) -> Tensor:
    """Mean number of entries above JumpReLU's threshold; its straight-through gradient moves the threshold alone."""
    above: Tensor = _Above.apply(wide(code), wide(log_threshold), bandwidth)
    return above.sum(dim=1).mean()


def gate_l1(code: Tensor, u: Tensor) -> Tensor:
    """Mean over the batch of the sum of max(u, 0): the sparsity of a gated autoencoder's gate."""
    return wide(u).relu().sum(dim=1).mean()


def gate_reconstruction(code: Tensor, u: Tensor, x: Tensor, decoder: Tensor, decoder_bias: Tensor) -> Tensor:
    """Squared error, summed over the width, of what max(u, 0) alone would decode to; the decoder gets no gradient of it."""
    reconstruction = wide(u).relu() @ decoder.detach() + decoder_bias.detach()
    return F.mse_loss(reconstruction, wide(x), reduction="none").sum(dim=1).mean()


def attribution(code: Tensor, decoder: Tensor, gradient: Tensor) -> Tensor:
    """Mean over the batch of sum_j |z_j (g . d_j)|: few features shall matter to the model (arXiv:2405.08366; code amakelov/sae).

    Args:
        code: (B, h).
        decoder: (h, d).
        gradient: (B, d) of what the model is measured by, such as a logit difference, at the activation: the batch's ``gradient``.
    """
    return (wide(code) * (wide(gradient) @ decoder.T)).abs().sum(dim=1).mean()


def unexplained_attribution(code: Tensor, x: Tensor, reconstruction: Tensor, gradient: Tensor) -> Tensor:
    """Mean over the batch of |(x - x_hat) . g|: what the reconstruction lacks shall not matter. Arguments as of :func:`attribution`."""
    return ((wide(x) - wide(reconstruction)) * wide(gradient)).sum(dim=1).abs().mean()


# Functions by name; a technique's own stand there by their dotted path and are imported when they are used.
ACTIVATIONS: dict[str, Callable[..., Any] | str] = {
    "relu": relu,
    "gated": gated,
    "jumprelu": jumprelu,
    "topk": topk,
    "raw_topk": raw_topk,
    "batchtopk": batchtopk,
    "topafa": "lit_methods.sparse_autoencoders.top_afa.core.topafa",
    "abstopk": abstopk,
    "gba": gba,
    "proximal": "lit_methods.sparse_autoencoders.abstopk.core.proximal_map",
}
PENALTIES: dict[str, Callable[..., Any] | str] = {
    "l1": l1,
    "l0": l0,
    "gate_l1": gate_l1,
    "gate_reconstruction": gate_reconstruction,
    "attribution": attribution,
    "unexplained_attribution": unexplained_attribution,
    "afa": "lit_methods.sparse_autoencoders.top_afa.core.afa_loss",
}
ENCODER_BIAS: dict[str, EncoderBias] = {"relu": "learned", "gated": "learned", "jumprelu": "learned", "gba": "fixed"}  # others: none


def resolve(name: str | Callable[..., Any], known: Mapping[str, Callable[..., Any] | str], what: str) -> Callable[..., Any]:
    """A function by its name.

    Args:
        name: A key of ``known``, a dotted path ``package.module.function``, or the function itself.
        known: Name -> function, or its dotted path.
        what: What it is for, for the message.

    Raises:
        ValueError: There is none, or it's nothing that the module can call.
    """
    found = known.get(name, name) if isinstance(name, str) else name
    if not isinstance(found, str):
        return _checked(found, f"{what} {name!r}")
    module, _, last = found.rpartition(".")
    if not module:
        near = difflib.get_close_matches(found, known, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"{what} {found!r} is unknown{hint}: give one of {', '.join(known)}, or the dotted path of a function, such as my_file.{found}"
        )
    try:
        function = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{what} {found!r} can't be imported ({error}): give package.module.function of a module that Python finds"
        ) from None
    return _checked(function, f"{what} {found!r}")


def _checked(function: Any, called: str) -> Callable[..., Any]:
    """The function, if its arguments can be read, which say what it gets."""
    if not hasattr(function, "__qualname__") or isinstance(function, type) or not callable(function):
        kind = "class" if isinstance(function, type) else type(function).__name__
        raise ValueError(f"{called} is a {kind}: give a function, def mine(u): ..., whose u are the pre-activations (B, features)")
    try:
        arguments = list(inspect.signature(function).parameters.values())
    except ValueError:
        raise ValueError(
            f"{called} is built into Python or torch, and the names of its arguments can't be read: give a function of your own that calls "
            f"it, such as def mine(u): return {function.__name__}(u)"
        ) from None
    if not arguments or arguments[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise ValueError(f"{called} has no first argument: it gets (B, features), as in def mine(u): ...")
    return function  # type: ignore[no-any-return]


def named_arguments(function: Callable[..., Any]) -> dict[str, bool]:
    """What a function names behind its first argument: name -> whether it must be given."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return {one.name: one.default is one.empty for one in named}


def check_settings(
    activation: str, functions: Mapping[str, Callable[..., Any]], offered: Iterable[str], settings: Mapping[str, Any]
) -> None:
    """Raise unless the activation gets what it must have, and every setting is wanted by a function.

    Args:
        activation: Name of the activation.
        functions: Name -> function: the activation and the penalties. What a penalty still lacks may be in the batches.
        offered: Names that the module supplies.
        settings: What the user gives.

    Raises:
        ValueError: Otherwise.
    """
    supplied = set(offered)
    if missing := [
        name for name, needed in named_arguments(functions[activation]).items() if needed and name not in supplied and name not in settings
    ]:
        raise ValueError(f"activation {activation} needs {', '.join(missing)}: give it as in settings: {{{missing[0]}: ...}}")
    wanted = {name for function in functions.values() for name in named_arguments(function)} - supplied
    if unknown := [name for name in settings if name not in wanted]:
        takes = f"takes {', '.join(sorted(wanted))}" if wanted else "takes none"
        raise ValueError(f"settings has {', '.join(unknown)}, and {' with '.join(functions)} {takes}: take it out, or correct its name")


def call(name: str, function: Callable[..., Any], first: Tensor, offered: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """The function's result, given what it names of ``offered`` and ``settings``.

    Raises:
        ValueError: It names something that is in neither.
    """
    known, named = {**offered, **settings}, named_arguments(function)
    if missing := [one for one, needed in named.items() if needed and one not in known]:
        raise ValueError(f"{name} needs {', '.join(missing)}: give it under settings, or in the batches, which have {', '.join(known)}")
    return function(first, **{one: known[one] for one in named if one in known})
