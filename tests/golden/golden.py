"""The one harness for golden vectors: discovery, loading, comparison, report.

A technique's test file declares its kinds and nothing else::

    test_golden = golden_test("superflow", {"infonce": Kind(infonce, rtol=1e-6), ...})

Cases are the files ``<dir>/<slug>/<kind>-*.npz``, where ``<dir>`` is ``$LIT_METHODS_GOLDEN_DIR`` or ``tests/golden/data``. Zero cases of a
kind, a file of an undeclared kind and an output that the adapter leaves out are failures.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("LIT_METHODS_GOLDEN_DIR") or Path(__file__).parent / "data")


class GoldenCase:
    """One ``.npz`` file: ``in_*`` arrays, ``hp_*`` scalars, ``out_*`` references."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}

    def tensor(self, key: str) -> Tensor:
        """Array ``key`` as a tensor of the same dtype."""
        return torch.from_numpy(np.ascontiguousarray(self.arrays[key]))

    def hp(self, name: str) -> Any:
        """Scalar ``hp_<name>`` as a Python number or string."""
        return self.arrays[f"hp_{name}"].item()

    @property
    def expected(self) -> dict[str, np.ndarray]:
        """The reference outputs."""
        return {key: value for key, value in self.arrays.items() if key.startswith("out_")}


Adapter = Callable[[GoldenCase], Mapping[str, Tensor | np.ndarray | float | int]]
Comparison = Callable[[GoldenCase, str, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Kind:
    """An adapter with its tolerance.

    Attributes:
        adapter: Maps names only: case -> ``{"out_*": value}``.
        rtol: Relative to the largest absolute reference of the array.
        atol: Absolute.
        overrides: Output name -> (rtol, atol), for gradients and the like; the longest matching prefix wins.
        compare: Replaces the comparison, for a kind whose README states another one.
    """

    adapter: Adapter
    rtol: float = 1e-6
    atol: float = 1e-9
    overrides: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    compare: Comparison | None = None


def _close(kind: Kind, key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    assert ours.shape == reference.shape, f"{key}: shape {ours.shape}, reference {reference.shape}"
    if not np.issubdtype(reference.dtype, np.inexact):
        wrong = int((ours != reference).sum())
        assert wrong == 0, f"{key}: {wrong} of {reference.size} entries differ"
        return
    if reference.size == 0:
        return
    prefix = max((p for p in kind.overrides if key.startswith(p)), key=len, default=None)
    rtol, atol = (kind.rtol, kind.atol) if prefix is None else kind.overrides[prefix]
    assert np.array_equal(np.isnan(ours), np.isnan(reference)), f"{key}: NaNs in other places"
    error = float(np.nanmax(np.abs(ours.astype(np.float64) - reference.astype(np.float64)), initial=0.0))
    limit = atol + rtol * float(np.nanmax(np.abs(reference), initial=0.0))
    assert error <= limit, f"{key}: largest error {error:.3e} > {limit:.3e}"


def check(kind: Kind, case: GoldenCase) -> None:
    """Run the adapter on one case and compare every output."""
    ours = {key: np.asarray(value.detach() if isinstance(value, Tensor) else value) for key, value in kind.adapter(case).items()}
    missing = case.expected.keys() - ours.keys()
    assert not missing, f"{case.name}: the adapter returns no {sorted(missing)}"
    for key, reference in case.expected.items():
        if kind.compare is None:
            _close(kind, key, ours[key], reference)
        else:
            kind.compare(case, key, ours[key], reference)


def golden_test(slug: str, kinds: Mapping[str, Kind]) -> Callable[..., None]:
    """A parametrised test with one id per case file, such as ``test_golden[loss-0]``."""
    files = sorted((GOLDEN_DIR / slug).glob("*.npz"))
    parameters: list[Any] = [pytest.param(path, id=path.stem) for path in files]
    for name in kinds:
        if not any(path.stem.rpartition("-")[0] == name for path in files):
            parameters.append(pytest.param(None, id=f"{name}-no-case-found"))

    @pytest.mark.parametrize("path", parameters or [pytest.param(None, id="no-case-found")])
    def test_golden(path: Path | None) -> None:
        assert path is not None, f"no golden case found in {GOLDEN_DIR / slug}"
        name = path.stem.rpartition("-")[0]
        assert name in kinds, f"{path.name}: no adapter for kind {name!r}; there are {sorted(kinds)}"
        check(kinds[name], GoldenCase(path))

    test_golden.kinds = dict(kinds)  # type: ignore[attr-defined]  # for tests/test_reachability.py
    return test_golden
