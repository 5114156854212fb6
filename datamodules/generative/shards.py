"""Latents of images or videos with embeddings of their prompts, in tar files as webdataset writes them; read with the standard library."""

import io
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_methods.checks import at_least, positive
from lit_methods.datamodules.base import Batches, Ints
from lit_methods.datamodules.cache import cache_folder, making_folder
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import counts, data_path, listed
from lit_methods.datamodules.generative.base import Batch, GenerativeDataModule
from lit_methods.datamodules.reading import file_size, read_bytes, read_tensors

BLOCK = 512  # bytes; every part of a tar file begins at a multiple of it
BUILT_IN = 2  # version of the built-in sample
TEXT_TOKENS, TEXT_WIDTH = 6, 16  # of its embeddings


class Part(NamedTuple):
    """Where a file lies within a tar file."""

    offset: int
    size: int


class Record(NamedTuple):
    """A sample: the tar file, the key that its parts share, and these by their endings."""

    shard: Path
    key: str
    parts: dict[str, Part]


def read_index(shard: Path, endings: Sequence[str]) -> list[Record]:
    """The samples of a tar file, from its headers alone.

    Args:
        shard: Members are called ``<key>.<ending>``; those of a sample stand together, as in webdataset. Folders before the key are a part
            of it.
        endings: Endings that a sample must have; parts with other endings are left out.

    Raises:
        BrokenRecordError: The file is truncated or no tar file, or a sample lacks a part.
    """
    size, end = file_size(shard, "file", "fetch it anew"), 0
    found: dict[str, dict[str, Part]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if member.issparse():
                    raise BrokenRecordError(
                        shard, f"member {member.name[:80]!r}", "is sparse: write the file with webdataset or write_shard"
                    )
                if member.isfile() and ending and counts(name):  # macOS puts ._<name> beside each file
                    parts = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if ending in parts:
                        raise BrokenRecordError(shard, f"sample {stem!r}", f"has two parts {ending}: fetch the file anew")
                    parts[ending] = Part(member.offset_data, member.size)
    except BrokenRecordError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise BrokenRecordError(
            shard, "file", f"can't be read as a tar file ({error}): it is truncated or damaged, fetch it anew"
        ) from error
    if end + BLOCK > size:  # what follows the last member is at least one block of zeros
        raise BrokenRecordError(
            shard, "file", f"is truncated: it has {size} bytes and ends within or right behind its last member; fetch it anew"
        )
    for key, parts in found.items():
        if missing := [ending for ending in endings if ending not in parts]:
            raise BrokenRecordError(
                shard, f"sample {key!r}", f"has no {', '.join(missing)}, it has {', '.join(sorted(parts))}: name its endings"
            )
    return [Record(shard, key, {ending: parts[ending] for ending in endings}) for key, parts in found.items()]


def read_tensor(record: Record, ending: str) -> Tensor:
    """One part of a sample, a tensor that ``torch.save`` wrote, read without running any code that the file may hold.

    Raises:
        BrokenRecordError: Something else lies there, or numbers that aren't finite.
    """
    part = record.parts[ending]
    with record.shard.open("rb") as file:
        file.seek(part.offset)
        content = file.read(part.size)
    return _tensor(content, record.shard, f"{record.key}.{ending}")


def _tensor(content: bytes, file: Path, field: str) -> Tensor:
    found = read_tensors(content, file, field, "write it with torch.save")
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_complex() or found.is_quantized:
        kind = f"tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise BrokenRecordError(file, field, f"holds a {kind}: save a tensor of numbers")
    found = found.float()
    if not found.isfinite().all():
        raise BrokenRecordError(file, field, "has numbers that aren't finite in float32: leave the sample out")
    return found


def write_shard(path: Path | str, samples: Iterable[tuple[str, Mapping[str, Tensor | str]]]) -> None:
    """Write a tar file that this data module, and webdataset, can read.

    Args:
        path: The tar file; it is replaced.
        samples: Key, without dots, and its parts by their endings: tensors as ``torch.save`` writes them, texts in UTF-8.

    Raises:
        ValueError: A key with a dot.
    """
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            if "." in key:
                raise ValueError(f"key {key!r} has a dot, which separates it from the endings: give another one")
            for ending, content in parts.items():
                buffer = io.BytesIO()
                if isinstance(content, str):
                    buffer.write(content.encode())
                else:
                    torch.save(content.clone(), buffer)  # a view would be saved with all that it is a view of
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)


class LatentShards(Batches):
    """Samples of tar files, in the order of files and members. A loader fetches a whole batch in one go.

    Args:
        records: What :func:`read_index` has found.
        latent: Ending of the latents.
        embedding: Ending of the prompt's embeddings; None: batches have no ``prompt``.
        tokens: Length that the embeddings are filled up to with zeros; None: they have one length.
        null_embedding: (L, D) of the negative prompt; None: batches have no ``null_prompt``.
        scale: Factor of the latents.
    """

    def __init__(
        self,
        records: Sequence[Record],
        latent: str,
        embedding: str | None,
        tokens: int | None = None,
        null_embedding: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        self.records, self.latent, self.embedding, self.tokens, self.scale = list(records), latent, embedding, tokens, scale
        self.null_embedding = None if null_embedding is None else self._filled(null_embedding, "the embedding of the negative prompt")

    def __len__(self) -> int:
        return len(self.records)

    def _filled(self, embedding: Tensor, name: str) -> Tensor:
        if embedding.ndim == 3 and len(embedding) == 1:
            embedding = embedding[0]
        if embedding.ndim != 2 or (self.tokens is not None and len(embedding) > self.tokens):
            limit = "" if self.tokens is None else f" with L of at most tokens={self.tokens}"
            raise ValueError(f"{name} is {tuple(embedding.shape)}: give (L, D){limit}")
        missing = 0 if self.tokens is None else self.tokens - len(embedding)
        return torch.nn.functional.pad(embedding.float(), (0, 0, 0, missing))

    def _stacked(self, records: Sequence[Record], tensors: Sequence[Tensor], ending: str) -> Tensor:
        for record, tensor in zip(records, tensors, strict=True):
            if tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"{record.shard}: {record.key}.{ending} is {tuple(tensor.shape)}, but {records[0].key} of {records[0].shard} is "
                    f"{tuple(tensors[0].shape)}: a batch needs one shape, keep other sizes in other folders"
                )
        return torch.stack(list(tensors))

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Samples as stored; the same in every epoch."""
        records = [self.records[k] for k in index]
        latents = [read_tensor(record, self.latent) for record in records]
        latents = [latent[0] if latent.ndim == 5 and len(latent) == 1 else latent for latent in latents]
        batch = {"image": self._stacked(records, latents, self.latent) * self.scale}
        if self.embedding is not None:
            ending = self.embedding
            prompts = [self._filled(read_tensor(record, ending), f"{record.shard}: {record.key}.{ending}") for record in records]
            batch["prompt"] = self._stacked(records, prompts, ending)
        if self.null_embedding is not None:
            batch["null_prompt"] = self.null_embedding.expand(len(records), -1, -1)
        return batch


class LatentShardsDataModule(GenerativeDataModule):
    """Latents in webdataset's tar files, ``<key>.latent.pth`` and ``<key>.embed.pth`` for each sample, as rCM is trained with.

    Batch: {"image": (B, C, T, H, W) float32, "prompt": (B, L, D) float32}

    Latents of images are (B, C, H, W). Without ``embedding`` there is no ``prompt``; with ``null_embedding`` there is also ``null_prompt``
    (B, L, D). Samples are drawn at random places of all tar files, whose headers are read at the
    start. Tensors are read with ``weights_only``.

    Args:
        root: Folder of the tar files. None: the built-in sample, 64 videos of a moving blob with 4 channels, 2 frames of 8 x 8 and one of 8
            prompts of 6 tokens with 16 features, kept in the cache folder.
        pattern: Pattern of the tar files' names.
        latent: Ending of the latents.
        embedding: Ending of the embeddings; None: there are none.
        tokens: Length that embeddings are filled up to with zeros, 512 for Wan 2.1; None: they have one length.
        null_embedding: File with the embedding (L, D) of the negative prompt, as ``torch.save`` writes it.
        scale: Factor of the latents; their standard deviation should be about 1.
        num_val: The last samples, which are for validation.
        batch_size: Samples per process and step.
        val_batch_size: Samples per process and validation step.
        num_samples: Samples that ``lit predict`` draws, at most ``num_val``.
        num_workers: Processes that read data.
        seed: Seed of the order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        root: Path | None = None,
        pattern: str = "shard*.tar",
        latent: str = "latent.pth",
        embedding: str | None = "embed.pth",
        tokens: int | None = None,
        null_embedding: Path | None = None,
        scale: float = 1.0,
        num_val: int = 8,
        batch_size: int = 8,
        val_batch_size: int = 8,
        num_samples: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_samples=num_samples, num_workers=num_workers, seed=seed)
        at_least(1, num_val=num_val)
        positive(scale=scale)
        self.save_hyperparameters()
        self.root, self.null_embedding = data_path(root), data_path(null_embedding)

    def prepare_data(self) -> None:
        """Make the built-in sample."""
        if self.root is None:
            built_in_shards()

    def check_root(self, stage: str = "fit") -> None:
        """Look for tar files."""
        if self.root is not None:
            self._shards(self.root)

    def _shards(self, root: Path) -> list[Path]:
        pattern = self.hparams["pattern"]
        if not (shards := listed(root, pattern)):
            raise WrongRootError(f"root={str(root)!r} has no {pattern}: put the tar files there, or set root=null for the sample")
        return shards

    def setup(self, stage: str) -> None:
        """Read the headers of all tar files.

        Raises:
            WrongRootError: No tar file.
            FileNotFoundError: No file of the negative prompt.
            BrokenRecordError: A damaged file.
            ValueError: Too few samples.
        """
        if self.train_set is not None:
            return
        hp = self.hparams
        root = built_in_shards() if self.root is None else self.root
        shards = self._shards(root)
        endings = [hp["latent"], *([] if hp["embedding"] is None else [hp["embedding"]])]
        records = [record for shard in shards for record in read_index(shard, endings)]
        if len(records) <= hp["num_val"]:
            raise ValueError(
                f"{len(shards)} tar files in {root} have {len(records)} samples: set num_val={hp['num_val']} to less than that"
            )
        null = None
        if self.null_embedding is not None:
            path = self.null_embedding
            null = _tensor(read_bytes(path, "null_embedding", "give a file that torch.save wrote"), path, "null_embedding")
            prompt = None if hp["embedding"] is None else read_tensor(records[0], hp["embedding"])
            if prompt is not None and prompt.ndim > 1 and null.ndim > 1 and prompt.shape[-1] != null.shape[-1]:
                widths = f"is {null.shape[-1]} wide, and the prompts {prompt.shape[-1]}"
                raise BrokenRecordError(path, "null_embedding", f"{widths}: encode the negative prompt as the prompts were")
        settings = (hp["latent"], hp["embedding"], hp["tokens"], null, hp["scale"])
        cut = len(records) - hp["num_val"]
        parts = (records[:cut], records[cut:], records[cut : cut + self.num_samples])
        self.train_set, self.val_set, self.predict_set = (LatentShards(part, *settings) for part in parts)


def built_in_shards() -> Path:
    """Folder of the built-in sample, two tar files, made on the first call and kept."""
    root = cache_folder() / f"latent-shards-v{BUILT_IN}"
    if root.is_dir():
        return root
    with making_folder(root) as work:
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(8, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
        grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
        for shard in range(2):
            samples: list[tuple[str, Mapping[str, Tensor | str]]] = []
            for number in range(32 * shard, 32 * shard + 32):
                prompt, start = number % 8, 2 + 3 * torch.rand(2, generator=generator)
                angle = torch.tensor(prompt * math.pi / 4)  # the prompt is the direction of motion
                places = start + torch.arange(2.0)[:, None] * torch.stack([angle.sin(), angle.cos()])
                blob = torch.exp(-(grid - places[..., None, None]).square().sum(1) / 3)  # (2, 8, 8)
                colour = torch.tensor([3.0, -2.0, 1.0, 2.0]).roll(prompt % 4)
                latent = colour[:, None, None, None] * blob + 0.5 * torch.randn(4, 2, 8, 8, generator=generator)
                parts: dict[str, Tensor | str] = {
                    "latent.pth": latent,
                    "embed.pth": embeddings[prompt],
                    "prompt.txt": f"a blob that moves by {45 * prompt} degrees",
                }
                samples.append((f"{number:06d}", parts))
            write_shard(work / f"shard-{shard:04d}.tar", samples)
    return root
