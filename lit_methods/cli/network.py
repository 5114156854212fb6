"""``lit export --format onnx | torch-export``: the network of a run as one graph that needs nothing of ours, compared with the module."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.cli.quiet import quiet
from lit_methods.cli.share import CONFIG, metadata, origin, run_of
from lit_methods.errors import CommandError, suggest
from lit_methods.files import replacing

SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}
INPUTS = ("image", "images", "x", "clip", "input_ids", "points")  # of a batch, the first one that it has
TOLERANCE = 1e-4  # relative to the largest output
ROWS = 3  # of the batch that both are compared on; the graph was made with two


class _Plain(nn.Module):
    """What is written: the part alone, called with one tensor."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        return self.part(x)


def export_network(checkpoint: Path, out: Path, form: str, part: str, shape: Sequence[int] | None, tokens: int | None) -> str:
    """Write a module's forward, or that of a part of it, and compare it with the module.

    Args:
        checkpoint: Of a run whose folder has its config.
        out: File to write.
        form: ``onnx`` or ``torch-export``.
        part: Name of a submodule, such as ``network`` or ``student.body``; "": the module itself.
        shape: Shape of the input without the batch; None: that of the run's own validation data.
        tokens: Inputs are whole numbers below this, with ``shape``; None: float32.

    Returns:
        What was written and how far it is from the module, in a line.

    Raises:
        CommandError: The network can't be written as one graph, or the graph gives something else; the message says what to do.
    """
    _check_library(form)
    with quiet("lightning.pytorch", "lightning.fabric"):
        network, config = _network(checkpoint, part)
        example = _example(config, shape, tokens)
    plain = _Plain(network).eval().requires_grad_(False)
    name = f"{type(network).__name__}{f' ({part})' if part else ''}"
    with torch.no_grad():
        try:
            expected = plain(example)
        except Exception as error:  # whatever a foreign forward raises for an input of another kind
            raise CommandError(
                f"{name} can't be called with a tensor {tuple(example.shape)}: {_first_line(error)}\n  give --shape of its input without "
                f"the batch, or --part with one of {_parts(network)}"
            ) from error
    if not all(isinstance(value, Tensor) for value in _flat(expected)):
        raise CommandError(
            f"{name} gives {type(expected).__name__} with other things than tensors: give --part with one of {_parts(network)}"
        )
    facts = metadata(origin(checkpoint))
    with replacing(out) as partial:
        written = (_write_onnx if form == "onnx" else _write_exported)(plain, example[:2], partial, facts, name)
        compared = _compared(written(example), _flat(expected), out) if written is not None else ""
    count = sum(parameter.numel() for parameter in network.parameters())
    told = f"{out}: {name}, {count:,} parameters, input (batch, {', '.join(map(str, example.shape[1:]))}) {str(example.dtype)[6:]}"
    return (
        f"{told}\n  {compared}"
        if compared
        else f'{told}\n  not compared with the module: pip install "lit-methods[onnx]" brings onnxruntime'
    )


def _check_library(form: str) -> None:
    import importlib.util

    if form == "onnx" and (missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]):
        raise CommandError(f'--format onnx needs {" and ".join(missing)}: pip install "lit-methods[onnx]"', exit_code=1)


# ---- module and input ------------------------------------------------------------------------------------------------------------------


def _network(checkpoint: Path, part: str) -> tuple[nn.Module, Any]:
    """The module with the checkpoint's weights, or a part of it, and the run's parsed config."""
    from lit_methods.cli.lightning_cli import planned
    from lit_methods.runs.checkpoints import load_into

    run = run_of(checkpoint)
    if run is None:
        raise CommandError(f"{checkpoint} isn't in a run's folder with its {CONFIG}, which says how the network is built")
    cli, _ = planned(["validate", "--config", str(run / CONFIG)])
    config = cli.config["validate"]
    module = cli.built("model", config.model)
    try:
        module.configure_model()
        load_into(module, checkpoint)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    parts = dict(module.named_modules())
    if part and part not in parts:
        near = suggest(part, filter(None, parts), f"its own parts: {_parts(module)}")
        raise CommandError(f"{type(module).__name__} has no part {part!r}{near}")
    chosen = parts[part]
    from lightning.pytorch import LightningModule

    if type(chosen).forward in (nn.Module.forward, LightningModule.forward):
        raise CommandError(f"{type(chosen).__name__} has no forward of its own: give --part with one of {_parts(chosen)}")
    return chosen, config


def _parts(network: nn.Module) -> str:
    names = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
    return ", ".join(names) or "its parts (it has none)"


def _example(config: Any, shape: Sequence[int] | None, tokens: int | None) -> Tensor:
    """(3, ...) an input."""
    if shape is not None:
        generator = torch.Generator().manual_seed(0)
        if tokens is not None:
            return torch.randint(tokens, (ROWS, *shape), generator=generator)
        return torch.randn(ROWS, *shape, generator=generator)
    from lit_methods.cli.lightning_cli import PlannedCLI

    if config.get("data") is None:
        raise CommandError(
            "the run's config has no data section that would say what an input is like: give --shape, such as --shape 3 32 32"
        )
    data = PlannedCLI.built("data", config.data)
    data.prepare_data()
    data.setup("validate")
    loaders = data.val_dataloader()
    batch = next(iter(loaders[0] if isinstance(loaders, list | tuple) else loaders))
    values = batch if isinstance(batch, Mapping) else dict(enumerate(batch)) if isinstance(batch, list | tuple) else {0: batch}
    key = next((name for name in (*INPUTS, 0) if isinstance(values.get(name), Tensor)), None)
    if key is None:
        raise CommandError(f"a batch of {type(data).__name__} holds {', '.join(map(str, values))}, no single input: give --shape")
    rows: Tensor = values[key]
    return rows[torch.arange(ROWS) % len(rows)].clone()


# ---- writing ---------------------------------------------------------------------------------------------------------------------------


def _exported(plain: _Plain, example: Tensor, name: str) -> Any:
    batch = torch.export.Dim("batch")
    try:
        return torch.export.export(plain, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # torch.export raises errors of many classes, for what it can't follow
        raise CommandError(
            f"{name} can't be written as one graph for any batch: {_first_line(error)}\n  give --part with one of {_parts(plain.part)}; "
            "weights alone: lit export without --format",
            exit_code=1,
        ) from error


def _write_exported(plain: _Plain, example: Tensor, out: Path, facts: Mapping[str, str], name: str) -> Any:
    program = _exported(plain, example, name)
    with out.open("wb") as file:
        torch.export.save(program, file, extra_files={"origin.json": json.dumps(dict(facts))})
    with out.open("rb") as file:
        network = torch.export.load(file).module()
    return lambda x: _flat(network(x))


def _write_onnx(plain: _Plain, example: Tensor, out: Path, facts: Mapping[str, str], name: str) -> Any:
    program = _exported(plain, example, name)
    try:
        written = torch.onnx.export(program, dynamo=True, input_names=["input"], verbose=False)
    except Exception as error:  # an operation that ONNX lacks, of any class
        raise CommandError(f"{name} has an operation that ONNX doesn't: {_first_line(error)}", exit_code=1) from error
    assert written is not None
    written.model.metadata_props.update(facts)
    written.save(str(out))
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    key = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {key: x.numpy()})]


def _compared(found: Sequence[Tensor], expected: Sequence[Tensor], out: Path) -> str:
    """How far the graph is from the module.

    Raises:
        CommandError: Too far.
    """
    shapes = [[tuple(value.shape) for value in values] for values in (found, expected)]
    if shapes[0] != shapes[1]:
        raise CommandError(f"{out}: the graph gives {shapes[0]} where the module gives {shapes[1]}; nothing was kept", exit_code=1)
    far = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        if one.numel():
            far = max(far, float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)))
    if not far <= TOLERANCE:
        raise CommandError(f"{out}: the graph differs from the module by {far:.1e} of its largest output; nothing was kept", exit_code=1)
    return f"differs from the module by {far:.1e} of its largest output, on a batch of {ROWS} where it was made with 2"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [inner for entry in value.values() for inner in _flat(entry)]
    if isinstance(value, list | tuple):
        return [inner for entry in value for inner in _flat(entry)]
    return [value]


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__
