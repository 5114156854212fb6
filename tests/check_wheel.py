"""Run outside the repository: every module of an installed wheel imports, every technique is listed, configs are there.

Usage: python check_wheel.py FOLDER, with FOLDER first on PYTHONPATH.
"""

import importlib
import io
import pkgutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import lit_methods
from lit_methods.catalog import configs_folder, public_names, techniques
from lit_methods.cli.main import main

folder = Path(sys.argv[1]).resolve()
assert Path(lit_methods.__file__).is_relative_to(folder), f"imported {lit_methods.__file__}, not the wheel in {folder}"
modules = [module.name for module in pkgutil.walk_packages(lit_methods.__path__, "lit_methods.")]
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)
for name, package in public_names().items():
    getattr(importlib.import_module(package), name)
listed = io.StringIO()
with redirect_stdout(listed):
    assert main(["list"]) == 0
for slug, entry in techniques().items():
    assert slug in listed.getvalue(), f"`lit list` leaves out {slug}"
    for config in entry.configs:
        assert (configs_folder() / config).is_file(), f"{slug}: {config} is not in the wheel"
    for dotted in entry.classes:
        module, _, cls = dotted.rpartition(".")
        getattr(importlib.import_module(module), cls)
assert techniques(), "the catalogue is empty"
print(f"wheel: {len(modules)} modules import, {len(techniques())} techniques listed, {len(public_names())} public names")
