"""What libraries say while a command only looks at a run, or runs a step of it."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Neither warnings nor messages below errors of these loggers and those below them; afterwards all is as before.

    Args:
        loggers: Names, such as ``lightning.pytorch``.
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
