"""Where data that is made here is kept, and how a folder of it comes to be whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where generated data is kept: the environment variable LIT_METHODS_CACHE, or ``~/.cache/lit-methods``."""
    return Path(os.environ.get("LIT_METHODS_CACHE") or Path.home() / ".cache" / "lit-methods").expanduser()


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends, and is removed when the block raises.

    Readers see the whole folder or none. Several processes may make the same one: the first wins.

    Args:
        path: The folder to make, missing; its parents are made.

    Yields:
        A hidden folder beside it, whose name is ``.<name>.tmp-`` and something random.

    Raises:
        OSError: The folder can't be written or moved, and nobody else has made it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        work.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        yield work
        os.rename(work, path)
    except OSError:
        if not path.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


__all__ = ["cache_folder", "making_folder"]
