"""Autoencoders in sae-lens's format: a folder with ``cfg.json`` and ``sae_weights.safetensors``. sae-lens itself isn't needed.

The format was read from sae-lens 6.54 (decoderesearch/SAELens, ``saes/sae.py`` and ``saes/*_sae.py``). Its encoders compute what ours do,
with the weights transposed; what differs is folded into the weights, so that codes and reconstructions are equal up to rounding:

- ``norm_1`` and ``norm_sqrt`` here: the number that inputs are divided by goes into the weights; ``sample`` is their ``layer_norm``;
- factors of the features' outputs, and their choice by norms of the decoder (``rescale_acts_by_decoder_norm``), go into the weights;
- a fixed bias that decides alone who is active (``gba``) is their JumpReLU with a threshold of minus the bias.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_methods.catalog import public_names
from lit_methods.datamodules.reading import file_size, read_json
from lit_methods.files import replacing, write_json
from lit_methods.runs.checkpoints import check_readable, read_state_dict
from lit_methods.sparse_autoencoders.activations import ACTIVATIONS, PENALTIES
from lit_methods.sparse_autoencoders.module import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # of sae-lens, whose format is written: what has none counts as older than 6
ARCHITECTURES = {"standard": "relu", "topk": "topk", "abstopk": "abstopk", "jumprelu": "jumprelu", "gated": "gated"}  # theirs -> ours
_UNIT = 1e-4  # rows of the decoder whose norm differs from 1 by less have unit norm


# ---- ours to theirs --------------------------------------------------------------------------------------------------------------------


def _architecture(sae: SparseAutoencoder) -> tuple[str, dict[str, Any]]:
    """Their name of what an autoencoder of ours computes, and the fields that it has of its own.

    Raises:
        ValueError: It has none.
    """
    name, settings = sae.activation, sae.settings
    if name == "relu":
        return "standard", {}
    if name == "topk" or (name == "abstopk" and not settings.get("per_batch", False)):
        return name, {"k": min(int(settings["k"]), sae.features), "rescale_acts_by_decoder_norm": False}
    if name == "jumprelu" or (name == "gated" and settings.get("rectified", False)):
        return name, {}
    if name == "gba":
        if not settings.get("jump", True):
            return "standard", {}
        if sae.encoder_bias is None or bool((sae.encoder_bias <= 0).all()):
            return "jumprelu", {}
        raise ValueError(
            "gba with an encoder bias above 0 has codes below 0, which sae-lens has not: set settings: {jump: false}, or lower it"
        )
    reason = {
        "gated": "its magnitudes may be below 0, theirs go through a ReLU: train with settings: {rectified: true}",
        "abstopk": "it chooses among the whole batch (per_batch), which sae-lens does not",
        "batchtopk": "it chooses among the whole batch, and sae-lens saves such an autoencoder with a threshold that isn't known here",
    }.get(name, "it has no such activation")
    takes = ", ".join([*ARCHITECTURES.values(), "gba"])
    raise ValueError(f"activation {name!r} can't be saved in sae-lens's format: {reason}; it takes {takes}")


@torch.no_grad()
def save_saelens(sae: SparseAutoencoder, folder: Path | str, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write an autoencoder as sae-lens writes it, for its ``SAE.load_from_disk``.

    Args:
        sae: An autoencoder with relu, topk, abstopk, jumprelu, gated (``rectified``) or gba.
        folder: A new or an empty folder.
        metadata: What sae-lens notes of the activations: ``model_name``, ``hook_name``, ``context_size``, ...

    Returns:
        The folder.

    Raises:
        ValueError: sae-lens has no such autoencoder.
        FileExistsError: The folder holds something.
    """
    folder = Path(folder).expanduser()
    architecture, fields = _architecture(sae)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} isn't empty: give a new folder")
    scale = sae.input_scale if sae.normalize in ("norm_1", "norm_sqrt") else 1.0
    encoder = sae.decoder if sae.encoder is None else sae.encoder
    bias = torch.zeros(sae.features) if sae.encoder_bias is None else sae.encoder_bias
    weights = {"W_enc": encoder.T / scale, "W_dec": sae.decoder_directions * scale, "b_dec": sae.decoder_bias * scale}
    if architecture == "gated":
        weights |= {"b_gate": bias, "r_mag": sae.learned["log_scale"], "b_mag": sae.learned["magnitude_bias"]}
    elif architecture == "jumprelu":
        of_bias = sae.activation == "gba"
        weights["b_enc"] = torch.zeros(sae.features) if of_bias else bias
        weights["threshold"] = -bias if of_bias else sae.learned["log_threshold"].exp()
    else:
        weights["b_enc"] = bias
    config = {
        "d_in": sae.width,
        "d_sae": sae.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centre,
        "normalize_activations": "layer_norm" if sae.normalize == "sample" else "none",
        "reshape_activations": "none",
        **fields,
        "metadata": {"sae_lens_version": VERSION, "sae_lens_training_version": None, **(metadata or {})},
        "architecture": architecture,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as partial:
        save_file({name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in weights.items()}, partial)
    write_json(folder / CONFIG, config)  # last: a folder that has it is whole
    return folder


def from_checkpoint(checkpoint: Path | str) -> SparseAutoencoder:
    """The autoencoder of a run's checkpoint, in eval mode on the CPU.

    Raises:
        OSError: No such file.
        ValueError: It can't be read, or holds another module.
    """
    path = Path(checkpoint).expanduser()
    weights = read_state_dict(path, plain=False)
    if not {"decoder", "decoder_bias", "num_batches_not_active"} <= set(weights):
        raise ValueError(f"{path} is no checkpoint of a SparseAutoencoder: its weights are {', '.join(list(weights)[:4])}, ...")
    content = check_readable(path)
    written: dict[str, Any] = content.get("hyper_parameters", {})
    kind = _class_of(path, str(written.get("_class_path", "lit_methods.SparseAutoencoder")))
    arguments = {name: value for name, value in written.items() if name in inspect.signature(kind).parameters}
    named = [arguments["activation"]] if "activation" in arguments else []
    if own := [name for name in (*named, *(arguments.get("penalties") or {})) if name not in {**ACTIVATIONS, **PENALTIES}]:
        raise ValueError(f"{path} names {own[0]!r}, a function of one's own: none is imported out of a checkpoint, and sae-lens has none")
    module = kind(**arguments)
    module.load_state_dict(content["state_dict"])
    return module.eval()


def _class_of(path: Path, class_path: str) -> type[SparseAutoencoder]:
    """A class of ours that a checkpoint names; nothing else that it names is imported."""
    name = class_path.rpartition(".")[2]
    home = public_names().get(name)
    kind = getattr(importlib.import_module(home), name) if home is not None and class_path.startswith("lit_methods.") else None
    if not (isinstance(kind, type) and issubclass(kind, SparseAutoencoder)):
        raise ValueError(f"{path} was written by {class_path[:80]!r}, which is no autoencoder of lit_methods: call save_saelens in Python")
    return kind


# ---- theirs to ours --------------------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}: give a folder that sae-lens has written")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} can't be read (a {type(config).__name__}): it is damaged, fetch it anew")
    file_size(folder / WEIGHTS, "weights")
    try:
        weights = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} can't be read ({error}): it is truncated or damaged, fetch it anew") from error
    if wrong := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder / WEIGHTS}: {wrong[0]} holds a NaN or an infinity: it is damaged, fetch it anew")
    return config, weights


def _known(config: Mapping[str, Any], folder: Path) -> tuple[str, int | None]:
    """Their architecture and k, of configs since 6.0 and before.

    Raises:
        ValueError: Something that isn't here.
    """
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{folder} holds an sae-lens autoencoder of architecture {architecture!r}: those that are read here are {known}")
    before = config.get("activation_fn_str", config.get("activation_fn", "relu"))  # until 5
    k = config.get("k")
    if before == "topk":
        architecture, k = "topk", (config.get("activation_fn_kwargs") or {}).get("k")
    elif before != "relu":
        raise ValueError(f"{folder} holds an sae-lens autoencoder with activation {before!r}: those that are read here have relu or topk")
    if "topk" in architecture and not (isinstance(k, int) and k >= 1):
        raise ValueError(f"{folder / CONFIG}: k is {k!r}, expected an integer of 1 or more")
    if config.get("reshape_activations", "none") != "none":
        raise ValueError(f"{folder}: reshape_activations is {config['reshape_activations']!r}: heads that are joined are not read here")
    if config.get("finetuning_scaling_factor"):
        raise ValueError(f"{folder}: finetuning_scaling_factor is set: factors of a finetuning are not read here")
    return architecture, k if "topk" in architecture else None


@torch.no_grad()
def load_saelens(folder: Path | str) -> SparseAutoencoder:
    """An autoencoder that sae-lens has written: to judge it, or to train on.

    Args:
        folder: With ``cfg.json`` and ``sae_weights.safetensors``; architecture standard, topk, abstopk, jumprelu or gated.

    Returns:
        In float32 on the CPU. Where rows of its decoder haven't unit norm, ``renormalize`` is ``none``: training would change them.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Another architecture, a normalisation or an option that isn't here, or damaged files; the message names it.
    """
    folder = Path(folder).expanduser()
    config, weights = _read(folder)
    architecture, k = _known(config, folder)
    normalization = config.get("normalize_activations", "none")
    # `expected_average_only_in` is folded when sae-lens saves for inference, and has no effect there where it wasn't
    known = {"none": "none", "layer_norm": "sample", "expected_average_only_in": "none", False: "none"}
    if normalization not in known:
        raise ValueError(f"{folder}: normalize_activations is {normalization!r}: what is read here are none and layer_norm")
    try:
        width, features = int(config["d_in"]), int(config["d_sae"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: no d_in and d_sae ({error!r}): it is damaged, fetch it anew") from error
    own = {"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    shapes = {"W_enc": (width, features), "W_dec": (features, width), "b_dec": (width,), **dict.fromkeys(own, (features,))}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != shapes:
        wrong = [f"{name} is {found.get(name, 'missing')}, expected {shapes.get(name, 'none')}" for name in sorted({*found, *shapes})]
        told = ", ".join(line for line, name in zip(wrong, sorted({*found, *shapes}), strict=True) if found.get(name) != shapes.get(name))
        raise ValueError(f"{folder / WEIGHTS} doesn't fit {CONFIG} (d_in {width}, d_sae {features}, {architecture}): {told}")
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = weights["W_dec"].norm(dim=1)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    unit = bool(((weights["W_dec"].norm(dim=1) - 1).abs() < _UNIT).all())
    settings = {"k": min(k, features)} if k is not None else {"rectified": True} if architecture == "gated" else None
    sae = SparseAutoencoder(
        width,
        features,
        activation=ARCHITECTURES[architecture],
        settings=settings,
        encoder_bias="learned",
        centre=bool(config.get("apply_b_dec_to_input", True)),
        normalize=known[normalization],  # type: ignore[arg-type]
        renormalize="before" if unit else "none",
    )
    assert sae.encoder is not None
    assert sae.encoder_bias is not None
    sae.encoder.copy_(weights["W_enc"].T)
    sae.decoder.copy_(weights["W_dec"])
    sae.decoder_bias.copy_(weights["b_dec"])
    sae.encoder_bias.copy_(weights["b_gate" if architecture == "gated" else "b_enc"])
    if architecture == "gated":
        sae.learned["log_scale"].copy_(weights["r_mag"])
        sae.learned["magnitude_bias"].copy_(weights["b_mag"])
    if architecture == "jumprelu":
        sae.learned["log_threshold"].copy_(weights["threshold"].clamp(min=0).log())  # a ReLU stands in front: below 0 is as 0
    return sae.eval()


__all__ = ["from_checkpoint", "load_saelens", "save_saelens"]
