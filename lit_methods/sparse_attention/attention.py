"""Sparse attention in the place of a model's own, and out again.

Models of Hugging Face transformers compute attention by a function that they look up by a name of their configuration. Each attention
layer gets a copy of its configuration with our name in it, so a second model, even one with the same configuration object, sees nothing.
Layers that aren't theirs take part by a slot: an attribute ``attention_function``, None at first, that the layer calls when it is set.
"""

import copy
import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.sparse_attention.blocks import Implementation, KeptBlocks, all_pairs, block_attention, token_attention
from lit_methods.sparse_attention.method import AttentionCall, SparseAttention

NAME = "lit_methods_sparse"
PHASES = ("prefill", "decode", "denoise")
_SHOWN = 64  # steps of decoding that a picture shows
_SLOT = "attention_function"
_MARK = "_lit_methods_attention"
_REFUSED = {"softcap": "capped scores", "s_aux": "attention sinks as parameters", "position_bias": "a bias of positions"}


def attention_layers(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Attention layers that can be given another function: those of transformers, and those with a slot.

    Left out are layers with a sliding window, which are sparse already.

    Args:
        model: Any module.
        patterns: fnmatch patterns on names of submodules; None: all.

    Raises:
        ValueError: There are none.
    """
    every = {name: module for name, module in model.named_modules() if _is_attention(module)}
    found = {name: own for name, own in every.items() if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not found:
        known = f"it has {', '.join(list(every)[:4])}" if every else "there must be one of transformers, or one with an attention_function"
        raise ValueError(f"{type(model).__name__} has no attention layer called {patterns or 'anything'}: {known}")
    return found


def _is_attention(module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False) or getattr(module, "sliding_window", None):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    theirs = code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")
    return theirs or hasattr(module, _SLOT)


class AttentionSwap:
    """Puts a method into a model.

    It tells the places apart by shapes: as many causal queries as keys are a prefill, one query on a cache is a step of decoding, and
    queries that look both ways are denoising. Padding before or behind the text is cut off before a method is asked.

    With :meth:`attach` it begins, with :meth:`detach` the model is as before. Between them :attr:`kept` and :attr:`full` count pairs of
    query and key, by place, and :attr:`shown` holds what was chosen last for the first layer and sample, for :meth:`picture`. Gradients
    flow as through any attention; weights of attention aren't returned.

    Refuses, when the model runs: several new tokens at once on a cache, masks that are more than padding, dropout of attention, capped
    scores and the like.

    Args:
        method: Chooses.
        implementation: As :func:`~lit_methods.sparse_attention.blocks.block_attention` has it.
    """

    def __init__(self, method: SparseAttention, implementation: Implementation = "auto") -> None:
        self.method, self.implementation = method, implementation
        self._layers: list[tuple[nn.Module, Any]] = []
        self._cut: dict[tuple[int, int], tuple[Tensor, int]] = {}  # kept keys of a compressed cache, and how many there were
        self._checked: tuple[Tensor | None, bool, list[tuple[Tensor, int, int]] | None] = (None, False, None)
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.kept: dict[str, float | Tensor] = dict.fromkeys(PHASES, 0.0)
        self.full: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.longest = 0  # most keys of a call
        self.shown: dict[str, list[tuple[KeptBlocks | Tensor | None, int]]] = {phase: [] for phase in PHASES}

    def sparsity(self, phase: str) -> float | None:
        """1 - computed / all pairs of a place; None if nothing was computed there."""
        return None if self.full[phase] == 0 else 1 - float(self.kept[phase]) / self.full[phase]

    def attach(self, model: nn.Module, patterns: Sequence[str] | None = None) -> "AttentionSwap":
        """Put the method into the attention layers of a model.

        Args:
            model: Any module with attention layers of transformers, or of ours.
            patterns: fnmatch patterns on names of submodules; None: all attention layers.

        Raises:
            ValueError: It has none, or another method is in there already.
        """
        if self._layers:
            raise ValueError("this method is in a model already: detach it first")
        layers = attention_layers(model, patterns)
        for name, module in layers.items():
            if _MARK in vars(module):
                raise ValueError(f"{name} has a sparse attention already: detach it first")
        self.method.start()
        for number, module in enumerate(layers.values()):
            theirs = None
            vars(module)[_MARK] = (self, number)
            if hasattr(module, _SLOT):
                setattr(module, _SLOT, _dispatch)
            else:
                theirs = module.config
                own: Any = copy.copy(theirs)
                object.__setattr__(own, "_attn_implementation_internal", NAME)
                module.config = own
            self._layers.append((module, theirs))
        if any(theirs is not None for _, theirs in self._layers):
            _register()
        return self

    def detach(self) -> None:
        """Take it out; a second call does nothing."""
        for module, theirs in self._layers:
            vars(module).pop(_MARK, None)
            if theirs is None:
                setattr(module, _SLOT, None)
            else:
                module.config = theirs
        if any(theirs is not None for _, theirs in self._layers):
            _unregister()
        self._layers = []
        self._cut, self._checked = {}, (None, False, None)
        self.method.start()

    def __enter__(self) -> "AttentionSwap":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # ---- attention ---------------------------------------------------------------------------------------------------------------------

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, causal: bool, mask: Any = None) -> Tensor:
        """Attention of one layer.

        Args:
            q: (B, Hq, n, d).
            k: (B, Hkv, m, d), those of a cache included.
            v: (B, Hkv, m, e).
            layer: Number of the layer.
            scale: Factor of the products.
            causal: Whether a query sees no key behind itself.
            mask: None, (B, m) bool or 0/1, or (B, 1, n, m) bool or additive: padding, and the causal mask.

        Returns:
            (B, Hq, n, e), 0 for padding.

        Raises:
            ValueError: What the class refuses.
        """
        n, m = q.shape[2], k.shape[2]
        if n != m and (n != 1 or not causal):
            what = "several new tokens at once on a cache" if causal else "keys of another text"
            raise ValueError(
                f"there are {n} queries and {m} keys, {what}: sparse attention takes a whole text (no cache before it, and no static "
                "cache), or one new token at a time"
            )
        phase = "denoise" if not causal else "prefill" if n == m else "decode"
        parts = self._parts(mask, q, k, causal)
        if parts is None:
            return self._part(phase, q, k, v, AttentionCall(layer, scale))
        result = v.new_zeros(q.shape[0], q.shape[1], n, v.shape[3])
        for number, (samples, first, last) in enumerate(parts):
            queries = q[samples] if phase == "decode" else q[samples, :, first:last]
            found = self._part(phase, queries, k[samples, :, first:last], v[samples, :, first:last], AttentionCall(layer, scale, number))
            if phase == "decode":
                result[samples] = found
            else:
                result[samples, :, first:last] = found
        return result

    def _part(self, phase: str, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Samples without padding."""
        n, m, heads = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
        causal = phase != "denoise"
        full = heads * (m if phase == "decode" else all_pairs(n, m, causal))
        self.full[phase] += full
        self.longest = max(self.longest, m)
        if phase == "decode":
            index = self._kept_tokens(m, call)
            if index is None:
                index = self.method.decode(q, k, call)
            self._show(phase, index, m, call)
            if index is None:
                self.kept[phase] = self.kept[phase] + full
                return _dense(q, k, v, call.scale, causal=False)
            self.kept[phase] = self.kept[phase] + (index >= 0).sum() * (q.shape[1] // index.shape[1])
            return token_attention(q, k, v, index, call.scale)
        kept = self.method.prefill(q, k, call) if causal else self.method.denoise(q, k, call)
        self._show(phase, kept, m, call)
        if kept is None:
            self.kept[phase] = self.kept[phase] + full
            found = _dense(q, k, v, call.scale, causal)
        else:
            self.kept[phase] = self.kept[phase] + kept.pairs(n, m).sum() * (q.shape[1] // kept.starts.shape[1])
            found = block_attention(q, k, v, kept, call.scale, self.implementation)
        if causal:
            self._cut.pop(call.key, None)
            index = self.method.compress(q, k, call)
            if index is not None:
                self._cut[call.key] = index, m
        return found

    def _show(self, phase: str, kept: KeptBlocks | Tensor | None, keys: int, call: AttentionCall) -> None:
        if call.key != (0, 0):
            return
        if phase == "decode":
            row = None if kept is None else kept[0].cpu()  # type: ignore[index]
            self.shown[phase] = [*self.shown[phase][-_SHOWN + 1 :], (row, keys)]
        else:
            self.shown = {name: [] for name in PHASES}
            if isinstance(kept, KeptBlocks):
                columns = None if kept.columns is None else kept.columns[:1]
                kept = KeptBlocks(kept.starts[:1], kept.query_block, kept.width, kept.causal, columns)
            self.shown[phase] = [(kept, keys)]

    def picture(self, phase: str) -> Tensor | None:
        """(H, rows, keys) bool: what the first layer's heads kept of the last text, or in the last steps of decoding; None: nothing ran."""
        shown = self.shown[phase]
        if not shown:
            return None
        if phase == "decode":
            most = shown[-1][1]
            rows = [torch.ones(1, keys, dtype=torch.bool) if index is None else _marked(index, keys) for index, keys in shown]  # type: ignore[arg-type]
            heads = max(len(row) for row in rows)
            return torch.stack([torch.nn.functional.pad(row.expand(heads, -1), (0, most - row.shape[1])) for row in rows], 1)
        kept, keys = shown[0]
        if isinstance(kept, KeptBlocks):
            return kept.mask(keys, keys)[0].cpu()
        full = torch.ones(1, keys, keys, dtype=torch.bool)
        return full.tril() if phase == "prefill" else full

    def _kept_tokens(self, keys: int, call: AttentionCall) -> Tensor | None:
        """What compression has left, and what came since."""
        if call.key not in self._cut:
            return None
        index, before = self._cut[call.key]
        if keys <= before:
            raise ValueError(f"there are {keys} keys after a text of {before}: its cache was cut, read the text again first")
        since = torch.arange(before, keys, device=index.device).expand(*index.shape[:2], -1)
        return torch.cat([index, since], -1)

    def _parts(self, mask: Any, q: Tensor, k: Tensor, causal: bool) -> list[tuple[Tensor, int, int]] | None:
        """Samples with the same padding, and where their text begins and ends; None: there is no padding.

        All layers of a model get the same mask, so it is looked at once.
        """
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"the mask is a {type(mask).__name__}: sparse attention reads tensors; build the model with sdpa or eager attention"
            )
        if self._checked[0] is mask and self._checked[1] == causal:
            return self._checked[2]
        n, m = q.shape[2], k.shape[2]
        seen = mask if mask.dtype == torch.bool else mask > 0 if mask.ndim == 2 else mask >= 0
        if seen.ndim == 4 and seen.shape[1] == 1:
            rows = seen[:, 0].expand(len(q), -1, -1)[..., :m]
            real = rows[:, -1]
            there = real[:, None, :].expand(-1, rows.shape[1], -1)
            if causal and n > 1:
                there = there.tril()
            wanted = real[:, -n:, None] if n > 1 else torch.ones_like(real[:, :1, None])  # rows of padding may hold anything
            if rows.shape[1] not in (1, n) or bool(((rows != there) & wanted).any()):
                raise ValueError("the mask hides more than padding and what comes later: sparse attention takes no other masks")
        elif seen.ndim == 2:
            real = seen[:, :m]
        else:
            raise ValueError(f"the mask has the shape {tuple(mask.shape)}: it must be (batch, keys) or (batch, 1, queries, keys)")
        place = torch.arange(m, device=real.device)
        first = torch.where(real, place, m).amin(-1)
        last = torch.where(real, place, -1).amax(-1) + 1
        if bool((real.sum(-1) != (last - first).clamp(min=0)).any()):
            raise ValueError("there is padding amid a text: put it before or behind")
        spans = torch.stack([first, last], -1)
        parts = None
        if bool((spans != torch.tensor([0, m], device=spans.device)).any()):
            parts = [
                ((spans == span).all(-1).nonzero()[:, 0], *span.tolist()) for span in spans.unique(dim=0) if int(span[1]) > int(span[0])
            ]
        self._checked = mask, causal, parts
        return parts


def _marked(index: Tensor, keys: int) -> Tensor:
    """(H, K) places, negative: none -> (H, keys) bool."""
    marks = torch.zeros(len(index), keys + 1, dtype=torch.bool)
    return marks.scatter_(1, torch.where(index >= 0, index, keys), True)[:, :keys]


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal and q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls; (B, n, Hq, e) comes back."""
    swap, layer = vars(module)[_MARK]
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {what} ({name}): sparse attention can't; leave this layer out")
    if dropout:
        raise ValueError(
            f"{type(module).__name__} drops attention weights ({dropout}): sparse attention can't; set the dropout to 0, or evaluate"
        )
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise ValueError(f"{type(module).__name__} sees a window of {window} keys and there are {key.shape[2]}: leave this layer out")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = swap.attention(query, key, value, layer, scale, causal, attention_mask)
    return found.transpose(1, 2).contiguous(), None


_USERS = [0]


def _register() -> None:
    from transformers.modeling_utils import AttentionInterface

    _USERS[0] += 1
    AttentionInterface.register(NAME, _dispatch)


def _unregister() -> None:
    from transformers.modeling_utils import AttentionInterface

    _USERS[0] -= 1
    if _USERS[0] == 0:
        AttentionInterface._global_mapping.pop(NAME, None)


__all__ = ["NAME", "PHASES", "AttentionSwap", "attention_layers"]
