"""The activations of a whole text, row by row from any place on, and how they become shards."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lit_methods.callbacks.targets import plain_module
from lit_methods.datamodules.activations.hooked import Site, activations, first_tensor, kept_rows
from lit_methods.datamodules.activations.shards import Part, read_header, shard_file, write_shard
from lit_methods.seeds import own_seed

_FORGOTTEN = 3600.0  # seconds after which half a file is one that nobody writes
_SAMPLED = 4096  # numbers of each weight that its mark is made of


class Texts:
    """Batches of a text loader from any place on, in an order that follows from a seed.

    Args:
        loader: A ``DataLoader``. Where its data set has a length, its samples are taken in an order of our own; else, as they come.
        seed: Of the order; None: the order of the data set.

    Raises:
        ValueError: It is no ``DataLoader``.
    """

    def __init__(self, loader: Any, seed: int | None) -> None:
        if not isinstance(loader, DataLoader):
            raise ValueError(f"the text's loader is a {type(loader).__name__}: give a datamodule with a DataLoader")
        self.loader, self.batch_size = loader, loader.batch_size or 1
        self.order: np.ndarray[Any, Any] | None = None
        if not isinstance(loader.dataset, IterableDataset):
            size = len(loader.dataset)  # type: ignore[arg-type]
            self.order = np.arange(size) if seed is None else np.random.default_rng(own_seed("order of text", seed)).permutation(size)

    def batches(self, start: int) -> Iterator[Any]:
        """All batches from number ``start`` on."""
        if self.order is None:
            return islice(iter(self.loader), start, None)
        left = self.order[start * self.batch_size :].tolist()
        groups = [left[place : place + self.batch_size] for place in range(0, len(left), self.batch_size)]
        workers = self.loader.num_workers
        generator = torch.Generator()  # else the loader draws from the global one
        return iter(
            DataLoader(
                self.loader.dataset, batch_sampler=groups, collate_fn=self.loader.collate_fn, num_workers=workers, generator=generator
            )
        )

    def mark(self) -> str:
        """What tells these texts from others: their number, and the first, the middle and the last of them."""
        found = hashlib.sha256(f"{self.batch_size} {None if self.order is None else len(self.order)}".encode())
        if self.order is None:
            samples = list(islice(iter(self.loader), 1))
        else:
            samples = [self.loader.dataset[place] for place in sorted({0, len(self.order) // 2, len(self.order) - 1}) if place >= 0]
        for sample in samples:
            tensor = first_tensor(sample)
            found.update(repr(sample).encode() if tensor is None else tensor.cpu().numpy().tobytes())
        return found.hexdigest()[:16]


def weights_mark(model: nn.Module) -> str:
    """What tells a model from others: names and shapes of its weights, and some thousand numbers of each."""
    found = hashlib.sha256(type(plain_module(model)).__name__.encode())
    for name, tensor in plain_module(model).state_dict().items():
        if isinstance(tensor, Tensor):
            flat = tensor.detach().reshape(-1)
            sampled = flat[:: max(1, flat.numel() // _SAMPLED)].cpu()
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(sampled.float().numpy().tobytes() if sampled.is_floating_point() else sampled.numpy().tobytes())
    return found.hexdigest()[:16]


class ActivationStream:
    """The activations of a text, row by row, from any place on.

    Args:
        model: Runs in eval mode, on the device that it is on.
        texts: What it reads.
        hook: Name of the submodule.
        site: Its ``output`` or ``input``.
        skip_first: Tokens at the beginning of each window that are left out.
        drop_tokens: Tokens that are left out.

    Attributes:
        place: Number of the text batch, and of its row, that come next.
    """

    def __init__(
        self, model: nn.Module, texts: Texts, hook: str, site: Site = "output", skip_first: int = 0, drop_tokens: Sequence[int] = ()
    ) -> None:
        self.model, self.texts, self.hook, self.site = model, texts, hook, site
        self.skip_first, self.drop_tokens = skip_first, list(drop_tokens)
        self.place = (0, 0)
        self._batches: Iterator[Any] | None = None
        self._rows: Tensor | None = None  # of the batch at `place`

    def seek(self, place: tuple[int, int]) -> None:
        """Go on from another place; costs one batch."""
        if place != self.place:
            self.place, self._batches, self._rows = place, None, None

    def _next_rows(self) -> Tensor | None:
        """Rows of the batch at ``place``; None: the text has ended."""
        number = self.place[0]
        if self._batches is None:
            self._batches = self.texts.batches(number)
        batch = next(self._batches, None)
        if batch is None:
            return None
        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        batch = pl.utilities.move_data_to_device(batch, device) if device.type != "cpu" else batch
        rows = kept_rows(activations(self.model, self.hook, batch, self.site), batch, self.skip_first, self.drop_tokens)
        if not rows.isfinite().all():
            row = int((~rows.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"hook={self.hook!r}: the activation of row {row} of text batch {number} has a NaN or an infinity; the shards written so "
                "far are whole and stay: look at the model's weights and precision on this text, or hook an earlier submodule"
            )
        return rows

    def fill(self, room: Tensor) -> int:
        """Put the next rows into a buffer.

        Args:
            room: (N, d), written in place, in its dtype.

        Returns:
            How many there were; fewer than N where the text ends.

        Raises:
            ValueError: Another width, or a number that the buffer's dtype can't hold.
        """
        done = 0
        while done < len(room):
            if self._rows is None:
                self._rows = self._next_rows()
                if self._rows is None:
                    break
            number, skip = self.place
            taken = self._rows[skip : skip + len(room) - done]
            if taken.shape[1] != room.shape[1]:
                widths = f"width {taken.shape[1]}, and {room.shape[1]} before"
                raise ValueError(f"hook={self.hook!r} gives {widths}: hook a submodule of one width")
            room[done : done + len(taken)].copy_(taken)
            if room.dtype == torch.float16 and not room[done : done + len(taken)].isfinite().all():
                raise ValueError(f"hook={self.hook!r} has activations that float16 can't hold: set dtype to bfloat16 or float32")
            done += len(taken)
            if skip + len(taken) >= len(self._rows):
                self.place, self._rows = (number + 1, 0), None
            else:
                self.place = (number, skip + len(taken))
        return done

    def width(self) -> int:
        """d, from the batch at ``place``.

        Raises:
            ValueError: There is no text.
        """
        if self._rows is None:
            self._rows = self._next_rows()
        if self._rows is None:
            raise ValueError("there is no text to harvest activations of")
        return self._rows.shape[1]


def harvest(
    stream: ActivationStream, root: Path, part: Part, rows: int, buffer_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> int:
    """Write shards until they hold so many rows, or the text ends. What is there already is kept, and what is missing is put in between.

    A shard is a buffer of consecutive rows, shuffled. Its header says where the next one begins, so that a killed harvest goes on behind
    the last whole shard and ends with the same files.

    Args:
        stream: Where rows come from.
        root: Folder of the shards; it must exist.
        part: Name of the part.
        rows: How many rows to have.
        buffer_size: Rows that are shuffled together.
        dtype: Of the files.
        seed: Of the shuffling.

    Returns:
        Rows that are there now.

    Raises:
        BrokenRecordError: A shard that is there already is damaged.
        ValueError: Activations that can't be used; shards written before stay.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    room: Tensor | None = None
    for left in root.glob(f".{part}-*.tmp"):  # by a harvest that was killed; they are large
        with suppress(FileNotFoundError):  # another process may be writing one just now, and may have finished
            if time.time() - left.stat().st_mtime > _FORGOTTEN:
                left.unlink()
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task(f"activations ({part})", total=rows)
        done, number, place = 0, 0, (0, 0)
        while done < rows:
            file, wanted = shard_file(root, part, number), min(buffer_size, rows - done)
            if not file.is_file():
                stream.seek(place)
                if room is None:
                    room = torch.empty(min(buffer_size, rows), stream.width(), dtype=dtype)
                found = stream.fill(room[:wanted])
                if not found:
                    break
                order = torch.from_numpy(np.random.default_rng([own_seed("shuffled buffer", seed), number]).permutation(found))
                batch, row = stream.place
                write_shard(file, room[:found][order], next_batch=batch, next_row=row, ended=int(found < wanted))
            shard = read_header(file)
            place = (shard.number("next_batch"), shard.number("next_row"))
            done, number = done + shard.rows, number + 1
            progress.update(task, completed=done)
            if shard.number("ended"):
                break
    return done


__all__ = ["ActivationStream", "Texts", "harvest", "weights_mark"]
