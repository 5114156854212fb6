"""Pretrained models from a folder or the Hugging Face hub; where one isn't there, one message at once instead of minutes of attempts."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = 5.0  # seconds for the hub's first answer


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


def fetch(load: Callable[[], T], name: str | Path, *, given: str, instead: str, download: str | None = None) -> T:
    """What ``load`` gives: from a folder, from the cache, or from the hub.

    Args:
        load: Calls ``from_pretrained`` or its like.
        name: A folder, or a name on the hub.
        given: The user's argument and its value, for the message, such as ``"name_or_path='gpt2'"``.
        instead: What else the user can do, for the message, such as ``"give the folder of a copy"``.
        download: Name on the hub, where it isn't ``name``.

    Raises:
        ValueError: The folder holds no such model, the hub can't be reached and the cache has none, or the hub refuses.
    """
    from huggingface_hub.errors import HFValidationError

    local = Path(name).is_dir()
    reachable = local or hub_reachable()
    try:
        with _cache_alone(not reachable):
            return load()
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        if isinstance(error, ValueError) and not local and not isinstance(error, HFValidationError):
            raise
        if isinstance(error, RuntimeError) and not said.startswith(("No pretrained weights", "Invalid pretrained")):
            raise
        if local:
            raise ValueError(f"{given} is a folder that can't be read as one of these ({said}): {instead}") from error
        if isinstance(error, HFValidationError) or str(name).startswith((".", "/", "~")):
            raise ValueError(f"{given} is neither a folder nor a name on the hub: {instead}") from error
        if reachable:
            raise ValueError(f"{given}: the hub doesn't give it ({said}): {instead}") from error
        source = str(download or name)
        raise ValueError(
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
    return fetch(
        lambda: timm.create_model(name, pretrained=True, **options),
        name,
        given=f"{given} of {name}",
        instead=instead,
        download=released.hf_hub_id if released is not None else None,
    )
