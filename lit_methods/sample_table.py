"""A state for every training sample: row i belongs to index i of the data set, not to a place in a batch."""

import torch
from torch import Tensor, nn

from lit_methods.checks import at_least
from lit_methods.distributed import gather_rows


def last_of_each(index: Tensor, size: int) -> Tensor:
    """For each entry of ``index`` the place of the last entry with the same value, so that a repeated sample has one state.

    Args:
        index: (B,) int64 in 0 to ``size - 1``.
        size: Rows of the table.

    Returns:
        (B,) int64 in 0 to B - 1. Doesn't wait for the device.
    """
    places = torch.arange(len(index), device=index.device)
    return torch.zeros(size, dtype=torch.int64, device=index.device).scatter_reduce(0, index, places, "amax", include_self=False)[index]


class SampleTable(nn.Module):
    """A (samples, columns) buffer, saved with the module that holds it and equal on all ranks.

    Rows are found by the index of the data set, so the table means the same after a resume with another number of workers or ranks.

    Args:
        num_samples: Samples of the training set, >= 1; 0 is a table that gets its size later (:meth:`resize`).
        columns: Numbers of a sample.
        fill: What every entry starts with.
        dtype: Floating point or integer.
    """

    rows: Tensor

    def __init__(self, num_samples: int, columns: int = 1, fill: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        at_least(0, "a number of samples", num_samples=num_samples)
        at_least(1, "a number of columns", columns=columns)
        self.fill = fill
        self.register_buffer("rows", torch.full((num_samples, columns), fill, dtype=dtype))

    def __len__(self) -> int:
        return len(self.rows)

    def resize(self, num_samples: int) -> None:
        """Start anew with another number of samples; the same number keeps every row."""
        if num_samples != len(self.rows):
            self.rows = self.rows.new_full((num_samples, self.rows.shape[1]), self.fill)

    def check(self, index: Tensor) -> None:
        """Raise if an index is not in the table. Waits for the device: call it once, not in every step.

        Raises:
            ValueError: ``index`` isn't (B,) integers in 0 to ``len(self) - 1``.
        """
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"the sample index is {tuple(index.shape)} {index.dtype}: expected (B,) integers")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(
                f"the sample index goes from {int(index.min())} to {int(index.max())} and the table has {len(self)} rows: "
                "give num_samples the size of the training set"
            )

    def read(self, index: Tensor) -> Tensor:
        """(B, columns): the rows of the samples ``index`` (B,) int64."""
        return self.rows[index]

    @torch.no_grad()
    def write(self, index: Tensor, rows: Tensor, *, gather: bool = False) -> None:
        """Replace the rows of ``index`` (B,) int64 by ``rows`` (B, columns); where a sample is repeated, its last row counts.

        Args:
            index: The samples' places in the data set.
            rows: Their new rows.
            gather: Write what all ranks have, on all ranks; a collective. Without it each rank's table has that rank's rows alone.
        """
        if gather:
            index, rows = gather_rows(index, with_grad=False), gather_rows(rows.detach(), with_grad=False)
        if len(index):
            last = last_of_each(index, len(self))
            self.rows[index] = rows[last].to(self.rows.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        saved = state_dict.get(prefix + "rows")
        if saved is not None and not len(self.rows) and saved.ndim == 2:
            self.resize(len(saved))  # the size wasn't known when the module was built
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


__all__ = ["SampleTable", "last_of_each"]
