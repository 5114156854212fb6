"""Denoisers out of Hugging Face transformers: masked language models, causal models made bidirectional, folders of LLaDA and Dream."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lit_methods.hub import fetch, place_of

# transformers doesn't know these two, but the architectures that they are: LLaMA and Qwen2 without a causal mask. Names from memory (mem).
_LLADA_KEYS = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "weight_tying",
}
_LLADA_NAMES = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    **{rf"^model\.transformer\.blocks\.(\d+)\.{one}_proj\.": rf"model.layers.\1.self_attn.{one}_proj." for one in "qkv"},
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}


class Denoiser(NamedTuple):
    """A model that sees all tokens at once.

    Attributes:
        model: Takes ``input_ids`` and gives ``.logits``.
        mask_token: The token that stands for a mask, where the configuration names one.
        shift: The logits are about the token that follows, as in models that were adapted from causal ones.
    """

    model: nn.Module
    mask_token: int | None
    shift: bool


def denoising_model(name_or_path: str | None, config: Mapping[str, Any] | None) -> Denoiser:
    """A masked language model of transformers, or a causal one without its causal mask, in float32.

    Args:
        name_or_path: Folder with ``config.json`` and weights, a name that transformers finds, or ``package:<name>`` for the one in an
        installed
            package. Folders of LLaDA (``model_type: llada``) and Dream (``Dream``) are read into transformers' LLaMA and Qwen2; code that
            comes with a model is never run.
        config: Instead: ``model_type`` and the arguments of its configuration, for random weights.

    Raises:
        ImportError: transformers is not installed.
        ValueError: Both or neither are given, or no such model.
        RuntimeError: The installed transformers can't take the causal mask away.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError('MaskedDiffusionLM needs transformers: pip install "lit-methods[transformers]"') from error
    if (name_or_path is None) == (config is None):
        raise ValueError(
            f"name_or_path is {name_or_path!r} and config is {config!r}: give one of them, a model's folder, or a configuration such as "
            "{model_type: llama, hidden_size: 64, ...}"
        )
    masked = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def auto(kind: str) -> Any:
        return transformers.AutoModelForMaskedLM if kind in masked else transformers.AutoModelForCausalLM

    if config is not None:
        settings = dict(config)
        kind = settings.pop("model_type", None)
        if kind not in masked and kind not in causal:
            raise ValueError(f"config.model_type is {kind!r}: give a masked or causal model of transformers, such as modernbert or llama")
        try:
            wanted = transformers.AutoConfig.for_model(kind, **settings)
            _without_causal_mask(wanted)
            model = auto(kind).from_config(wanted, dtype=torch.float32)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"config is {dict(config)}, which transformers can't build: {error}. Numbers of special tokens must lie below vocab_size"
            ) from error
        return _denoiser(model, wanted, kind in causal and kind not in masked, shift=False)
    assert name_or_path is not None
    given = f"name_or_path={name_or_path!r}"
    place, found = place_of(name_or_path, given)
    options: dict[str, Any] = dict(found)
    instead = "give the folder of a masked or causal language model (config.json and weights)"
    kind = _kind(place)
    if kind in ("llada", "Dream"):
        wanted, names = _foreign_config(transformers, Path(place), kind, given)
        options |= {"config": wanted, **({"key_mapping": names} if names else {})}
    else:
        wanted = fetch(lambda: transformers.AutoConfig.from_pretrained(place, **options), place, given=given, instead=instead)
        kind = wanted.model_type
        options |= {"config": wanted}
    if wanted.model_type not in masked and wanted.model_type not in causal:
        raise ValueError(f"{given} is a {wanted.model_type}: {instead}")
    _without_causal_mask(wanted)
    model, report = fetch(
        lambda: auto(wanted.model_type).from_pretrained(place, dtype=torch.float32, output_loading_info=True, **options),
        place,
        given=given,
        instead=instead,
        blank=lambda: (auto(wanted.model_type).from_config(wanted, dtype=torch.float32), {"missing_keys": ()}),
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{given} lacks {len(missing)} of the model's weights, such as {missing[0]}: {instead}")
    return _denoiser(model, wanted, wanted.model_type in causal and wanted.model_type not in masked, shift=kind == "Dream")


def _kind(place: str) -> str | None:
    """``model_type`` of a folder's ``config.json``; None: there is no such file, or none that can be read."""
    try:
        found = json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _foreign_config(transformers: Any, folder: Path, kind: str, given: str) -> tuple[Any, dict[str, str]]:
    """Configuration for transformers, and how the names of the weights change."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if kind == "Dream":
        kept = {
            name: value for name, value in said.items() if name not in ("model_type", "architectures", "auto_map", "transformers_version")
        }
        return transformers.AutoConfig.for_model("qwen2", **kept), {}
    missing = [name for name in ("d_model", "mlp_hidden_size", "n_layers", "n_heads") if not isinstance(said.get(name), int)]
    if missing:
        raise ValueError(f"{given}: config.json of a LLaDA has no {', '.join(missing)}: give the folder of a release")
    settings = {ours: said[theirs] for ours, theirs in _LLADA_KEYS.items() if said.get(theirs) is not None}
    settings["vocab_size"] = said.get("embedding_size") or said.get("vocab_size")
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": float(said.get("rope_theta", 10000.0))}
    settings |= {name: said[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id") if said.get(name) is not None}
    return transformers.AutoConfig.for_model("llama", **settings), _LLADA_NAMES


def _without_causal_mask(config: Any) -> None:
    config.is_causal = False  # what makes the masks reads this, for causal models
    config.use_cache = False


def _denoiser(model: Any, config: Any, causal: bool, *, shift: bool) -> Denoiser:
    if causal:
        for module in model.modules():
            if getattr(module, "is_causal", False) is True:  # what the attention itself reads
                module.is_causal = False
        _refuse_causal(model, config)
    mask_token = getattr(config, "mask_token_id", None)
    return Denoiser(model.train(), mask_token if isinstance(mask_token, int) else None, shift)


def _refuse_causal(model: Any, config: Any) -> None:
    """Raise if the first of three tokens doesn't see the last."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    tokens = torch.tensor([[0, 0, 0], [0, 0, 1]])
    trained = model.training
    with torch.no_grad():
        first = model.eval()(input_ids=tokens).logits[:, 0]
    model.train(trained)
    if torch.equal(first[0], first[1]):
        import transformers

        raise RuntimeError(
            f"transformers {transformers.__version__} keeps a {config.model_type} causal, and a denoiser must see both sides: give a "
            "masked language model (such as modernbert), or another causal one (such as llama), or upgrade transformers"
        )


__all__ = ["Denoiser", "denoising_model"]
