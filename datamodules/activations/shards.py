"""Activations on disk: files of shuffled rows, mapped into memory, read in an order that goes through one file after the other."""

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_methods.datamodules.base import Batches, Ints
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import listed
from lit_methods.datamodules.loaders import RankSampler
from lit_methods.datamodules.reading import file_size
from lit_methods.files import replacing

Part = Literal["train", "val"]
KEY = "activation"  # of the tensor in a shard
MAPPED = 4  # shards that a reader keeps open
_KINDS = ("F32", "F16", "BF16")


class Shard(NamedTuple):
    """A file of activations, as its header has it.

    Attributes:
        file: The file.
        rows: N of its tensor (N, d).
        width: d.
        notes: What was noted when it was written.
    """

    file: Path
    rows: int
    width: int
    notes: dict[str, Any]

    def number(self, note: str) -> int:
        """One of the notes.

        Raises:
            BrokenRecordError: It isn't there, or is no integer of 0 or more.
        """
        found = self.notes.get(note)
        if not isinstance(found, int) or found < 0:
            raise BrokenRecordError(self.file, note, f"is {found!r}, expected a number: delete the file, and it is harvested anew")
        return found


def shard_file(root: Path, part: Part, number: int) -> Path:
    """Path of a shard; numbers count up from 0 without a gap."""
    return root / f"{part}-{number:05d}.safetensors"


def shard_files(root: Path, part: Part) -> list[Path]:
    """The shards of a part that lie in a folder, in their order."""
    return listed(root, f"{part}-*.safetensors") if root.is_dir() else []


def write_shard(file: Path, activation: Tensor, **notes: int) -> None:
    """Write a shard, whole or not at all.

    Args:
        file: Its path; the folder must exist.
        activation: (N, d) float32, float16 or bfloat16.
        **notes: Kept in the file's header.
    """
    with replacing(file) as partial:
        # one entry, since safetensors writes several in any order, and a shard that is harvested again should be the same file
        save_file({KEY: activation.contiguous()}, partial, metadata={"notes": json.dumps(notes, sort_keys=True)})


def read_header(file: Path) -> Shard:
    """Size and notes of a shard; its rows aren't read.

    Raises:
        BrokenRecordError: It is truncated, no file of safetensors, or has no matrix of activations.
    """
    file_size(file, "file", "delete the shards behind it, too, and they are harvested anew")
    try:
        with safe_open(file, "pt") as stream:
            if KEY not in stream.keys():  # noqa: SIM118 (this one is no mapping)
                raise BrokenRecordError(file, KEY, f"is missing, the file has {', '.join(stream.keys()) or 'nothing'}")
            found = stream.get_slice(KEY)
            shape, kind, notes = list(found.get_shape()), str(found.get_dtype()), json.loads((stream.metadata() or {}).get("notes", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, BrokenRecordError):
            raise
        raise BrokenRecordError(
            file, "file", f"can't be read ({error}): it is truncated or damaged; delete it, and it alone is harvested anew"
        ) from error
    if not isinstance(notes, dict) or len(shape) != 2 or 0 in shape or kind not in _KINDS:
        raise BrokenRecordError(file, KEY, f"is {kind} of shape {shape}, expected rows (N, d) of {', '.join(_KINDS)}")
    return Shard(file, shape[0], shape[1], notes)


def read_headers(files: list[Path]) -> list[Shard]:
    """Headers of shards that belong together.

    Raises:
        BrokenRecordError: One is damaged, of another width than the first, or missing in the row.
    """
    found = [read_header(file) for file in files]
    for place, shard in enumerate(found):
        expected = re.sub(r"-\d+\.", f"-{place:05d}.", shard.file.name)
        if shard.file.name != expected:
            raise BrokenRecordError(shard.file.with_name(expected), "file", f"is missing, and {shard.file.name} is there: copy it")
        if shard.width != found[0].width:
            raise BrokenRecordError(
                shard.file,
                KEY,
                f"has width {shard.width}, but {found[0].file.name} has {found[0].width}: keep activations of one place in a folder",
            )
    return found


class ActivationShards(Batches):
    """Rows of shards, mapped from the files and turned into float32 when they are read. A loader fetches a whole batch in one go.

    Args:
        shards: Shards of one width.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.ends = np.cumsum([shard.rows for shard in shards])
        self._mapped: OrderedDict[int, Tensor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: it maps the files itself."""
        return self.__dict__ | {"_mapped": OrderedDict()}

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def width(self) -> int:
        """Numbers in a row, d."""
        return self.shards[0].width

    def rows(self, number: int) -> Tensor:
        """All rows of a shard (N, d) in its own dtype, mapped: what isn't looked at isn't read."""
        if number in self._mapped:
            self._mapped.move_to_end(number)
        else:
            shard = self.shards[number]
            if read_header(shard.file)[:3] != shard[:3]:
                raise BrokenRecordError(shard.file, "file", "has changed since the run began: start again")
            with safe_open(shard.file, "pt") as stream:
                self._mapped[number] = stream.get_tensor(KEY)
            if len(self._mapped) > MAPPED:
                self._mapped.popitem(last=False)
        return self._mapped[number]

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Chosen rows; the same in every epoch."""
        place = np.searchsorted(self.ends, index, side="right")
        found = torch.empty(len(index), self.width)
        for number in np.unique(place):  # one or two shards, in the order of ShardSampler
            mine = np.flatnonzero(place == number)
            within = index[mine] - (self.ends[number] - self.shards[number].rows)
            rows = self.rows(int(number))[torch.from_numpy(within)].float()
            if not rows.isfinite().all():
                row = int(within[int((~rows.isfinite().all(1)).nonzero()[0])])
                raise BrokenRecordError(self.shards[number].file, f"row {row}", "holds a NaN or an infinity: delete the file")
            found[torch.from_numpy(mine)] = rows
        return {"activation": found}


class ShardSampler(RankSampler):
    """Goes through the shards in a new order in every epoch, and through the rows of each in a new order.

    A file is so read once an epoch, in one go, and the whole data set need not fit in memory. Rows of different files don't meet within
    some batches: the harvest has shuffled them before.
    """

    dataset: ActivationShards

    def order(self) -> Ints:
        """All rows in the order of this pass."""
        if not self.shuffle:
            return super().order()
        rng, ends = np.random.default_rng([self.seed, self.pass_number]), self.dataset.ends
        shards = [(int(ends[k]) - self.dataset.shards[k].rows, int(ends[k])) for k in rng.permutation(len(ends))]
        return np.concatenate([start + rng.permutation(end - start) for start, end in shards])


__all__ = [
    "ActivationShards",
    "Part",
    "Shard",
    "ShardSampler",
    "read_header",
    "read_headers",
    "shard_file",
    "shard_files",
    "write_shard",
]
