"""The current folder comes last where modules are looked for, so that no file in it stands in for a library.

This module imports nothing beside the standard library: it runs before anything else is imported.
"""

import os
import sys

# For `python -c`, which puts the current folder at the front as "": this stands before the code of a child process.
CHILD_PREFIX = "import sys; sys.path.sort(key=bool, reverse=True); "


def add_current_folder() -> None:
    """Let a user's own classes be found by their dotted paths, as ``my_project.MyModule``, unless they are found already."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def current_folder_last() -> None:
    """Behind the libraries with the current folder, which ``python -m`` puts in front of them; the console script leaves it out.

    Where ``PYTHONPATH`` names it, the user has chosen, and it stays where it is.
    """
    here = os.getcwd()
    chosen = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if here not in chosen and sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    add_current_folder()
