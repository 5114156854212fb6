"""``lit prune``: prune a trained model once, without training, and write what is left."""

import shutil
from pathlib import Path
from typing import Any

from lit_methods.cli.quiet import quiet
from lit_methods.errors import CommandError

HELP = """\
usage: lit prune --config <config> [overrides as lit fit takes them] <out> [--compressed] [--force]

Prunes the model of a config once, by the callback in it that prunes trained networks (DSnoT, Wanda, SparseGPT, Magnitude), on calibration
samples of the config's data, and writes the pruned weights. Nothing is trained.

  <out>          a new folder: the model in Hugging Face's format, with pruning.json beside it, which says how it was pruned;
                 a new file ending in .pt or .safetensors: the state dict of the module
  --compressed   of a folder with pattern 2:4: pruned weights in compressed-tensors' format sparse-24-bitmask, half as large (needs
                 compressed-tensors 0.10, as later versions no longer read that format)
  --ckpt_path    checkpoint whose weights are pruned; default: the weights that the model is built with
  --force        overwrite <out>

  lit prune --config configs/dsnot_lm.yaml --ckpt_path runs/dsnot_lm/<time>/checkpoints/last.ckpt pruned
  lit prune --config configs/full/dsnot_llama.yaml --model.init_args.name_or_path /models/llama-7b pruned-7b

Exit status: 0 written, 1 data, weights or a library are missing, 2 a mistake in the arguments.
"""
_FILES = (".pt", ".pth", ".safetensors")


def prune(argv: list[str]) -> int:
    """``lit prune --config <config> [overrides] <out>``: prune and write."""
    if not argv or "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0 if argv else 2
    words = [word for word in argv if word not in ("--force", "--compressed")]
    place = 0 if words and not words[0].startswith("-") else len(words) - 1
    given = words.pop(place) if words else ""
    dangling = bool(words) and place == len(words) and words[-1].startswith("--") and "=" not in words[-1]
    if given.startswith("-") or dangling or not any(word.partition("=")[0] in ("--config", "-c", "--model") for word in words):
        raise CommandError("lit prune needs a config and the place to write to: lit prune --config configs/dsnot_lm.yaml pruned")
    out = Path(given).expanduser()
    if out.exists() and "--force" not in argv:
        raise CommandError(f"{out} exists: choose another name, or overwrite it with --force")
    compressed = "--compressed" in argv
    if compressed:
        _check_compressible(out)
    with quiet("lightning.pytorch"):
        module, callbacks, config = _pruned(words, out, compressed)
    _write(module, callbacks, config, out, compressed)
    return 0


def _check_compressible(out: Path) -> None:
    """Raise unless the format can be written, before anything is loaded."""
    if out.suffix in _FILES:
        raise CommandError(
            f"--compressed writes a folder in Hugging Face's format, but {out} is a file: leave out {out.suffix}, or --compressed"
        )
    try:
        import compressed_tensors.compressors.sparse_compressors  # noqa: F401
    except ImportError as error:
        why = "--compressed needs compressed-tensors with the format sparse-24-bitmask"
        raise CommandError(f'{why}: pip install "lit-methods[compressed]" ({error})', exit_code=1) from error


def _pruned(words: list[str], out: Path, compressed: bool) -> tuple[Any, Any, Any]:
    """Module, callbacks and config, once the callbacks have pruned the module."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from lit_methods.callbacks.sparsity.post_training import PostTrainingPruning
    from lit_methods.cli.lightning_cli import planned

    cli, _ = planned(["validate", *words])  # which seeds as the config says
    config = cli.config["validate"]
    callbacks = [cli.built("callback", section) for section in config.trainer.callbacks or []]
    own = [callback for callback in callbacks if isinstance(callback, PostTrainingPruning)]
    if not own:
        raise CommandError("the config has no callback that prunes: add one by --trainer.callbacks+=DSnoT (Wanda, SparseGPT, Magnitude)")
    if compressed and any(callback.pattern != (2, 4) for callback in own):
        raise CommandError("--compressed is for 2:4 alone: add --trainer.callbacks.pattern 2:4")
    if config.get("data") is None:
        raise CommandError("no calibration data: the config has no data section; add one by --data")
    data = cli.built("data", config.data)
    if hasattr(data, "check_root"):
        data.check_root("fit")
    module = cli.built("model", config.model)
    if out.suffix not in _FILES:
        _hugging_face(module, out)
    steps = {"validate": ("validation_step", "val_dataloader"), "test": ("test_step", "test_dataloader")}
    way = next((name for name, (step, _) in steps.items() if is_overridden(step, module, LightningModule)), "predict")
    trainer = Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        callbacks=[*own],
        limit_val_batches=1,
        limit_test_batches=1,
        limit_predict_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    options: dict[str, Any] = {"datamodule": data, "ckpt_path": config.get("ckpt_path"), "weights_only": config.get("weights_only")}
    getattr(trainer, way)(module, **options, **({} if way == "predict" else {"verbose": False}))
    return module, own, config


def _hugging_face(module: Any, out: Path) -> Any:
    """The model of transformers in a module."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise CommandError('writing a folder needs transformers: pip install "lit-methods[transformers]"', exit_code=1) from error
    found = [part for part in (module, *module.children()) if isinstance(part, PreTrainedModel)]
    if len(found) != 1:
        kind = f"{type(module).__name__} holds {len(found)} models of transformers"
        raise CommandError(f"{out}: {kind}, expected one to write as a folder; give a file ending in .pt or .safetensors instead")
    return found[0]


def _write(module: Any, callbacks: list[Any], config: Any, out: Path, compressed: bool) -> None:
    from lit_methods.cli.commands import save_weights
    from lit_methods.datamodules.cache import making_folder
    from lit_methods.files import write_json

    if out.suffix in _FILES:
        save_weights(out, module.state_dict())
    else:
        model = _hugging_face(module, out)
        if out.exists():
            shutil.rmtree(out)
        with making_folder(out) as folder:
            if compressed:
                _save_compressed(model, callbacks, folder)
            else:
                model.save_pretrained(folder)
            _save_tokenizer(config, folder)
            write_json(folder / "pruning.json", [_description(callback) for callback in callbacks])
        print(f"{out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters in Hugging Face's format")
    for callback in callbacks:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in callback.figures().items())
        print(f"{type(callback).__name__}: {len(callback.store.masks)} layers, {figures}")


def _save_compressed(model: Any, callbacks: list[Any], folder: Path) -> None:
    """The model with its 2:4 layers as values and bit masks, by compressed-tensors."""
    from compressed_tensors import ModelCompressor, Sparse24BitMaskConfig
    from torch.nn import Linear

    pruned = {id(weight) for callback in callbacks for weight in callback.store.weights.values()}
    layers = [name for name, layer in model.named_modules() if id(getattr(layer, "weight", None)) in pruned]
    others = [name for name in layers if not isinstance(model.get_submodule(name), Linear)]
    if others:
        raise CommandError(f"compressed-tensors reads nn.Linear alone, but {others[0]} is none: leave out --compressed")
    compressor = ModelCompressor(sparsity_config=Sparse24BitMaskConfig(targets=layers, ignore=[]))
    model.save_pretrained(folder, state_dict=compressor.compress(model))
    compressor.update_config(str(folder))


def _save_tokenizer(config: Any, folder: Path) -> None:
    """The tokenizer of the data, where it is one of transformers."""
    given = next((value for key, value in config.data.items() if key.rpartition(".")[2] == "tokenizer"), None)
    if given is None:
        return
    from transformers import AutoTokenizer

    from lit_methods.hub import place_of

    place, options = place_of(given, f"tokenizer={str(given)!r}")
    AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options).save_pretrained(folder)


def _description(callback: Any) -> dict[str, Any]:
    """How a model was pruned."""
    n_m = None if callback.pattern is None else ":".join(map(str, callback.pattern))
    named = {"sparsity": callback.sparsity, "pattern": n_m, "samples": callback.samples, "blocks": callback.blocks}
    return {"method": type(callback).__name__, **named, "density": callback.store.densities(), "layers": callback.report}
