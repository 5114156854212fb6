"""A small pair of towers for runs without files: pretrained here on coloured shapes and their captions, once, and kept."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.fewshot import coloured_shapes as shapes
from lit_methods.prompting.towers import TowerSizes, TwoTowers

_PAD, _START, _END, _UNKNOWN = range(4)
CONTEXT = 16


class WordTokenizer:
    """Words to numbers: a beginning, the words, an end, then nothing. Words that it doesn't know are all the same.

    Args:
        words: The known ones.
        length: Tokens of a text at most; what is longer is cut.
    """

    def __init__(self, words: Sequence[str], length: int = CONTEXT) -> None:
        self.numbers, self.length = {word: number for number, word in enumerate(words, start=4)}, length

    def __len__(self) -> int:
        return len(self.numbers) + 4

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, length) int64."""
        ids = torch.full((len(texts), self.length), _PAD)
        for row, text in zip(ids, texts, strict=True):
            own = [self.numbers.get(word, _UNKNOWN) for word in shapes.split_words(text)][: self.length - 2]
            row[: len(own) + 2] = torch.tensor([_START, *own, _END])
        return ids


class TinyTowers(TwoTowers):
    """Towers of 24 x 24 colour images and short English texts, pretrained contrastively on 36 kinds of coloured shapes, or of digits.

    Pretraining takes under a minute on one core; the result is kept in the cache folder (``LIT_METHODS_CACHE`` or
    ``~/.cache/lit-methods``) and read from there afterwards. Nothing is drawn from the global generators.

    Cost: 0.14 million parameters with the defaults; the first use pretrains them, under a minute on one core.

    Args:
        pretrain_steps: Steps of AdamW, with an image and a caption of each of the 36 classes; 0: random weights.
        seed: Seed of weights, images and captions.
        pictures: ``shapes``, or ``digits``: scikit-learn's real digits in colours. As in ``FewShotDataModule``.
    """

    def __init__(self, pretrain_steps: int = 500, seed: int = 0, pictures: shapes.Pictures = "shapes") -> None:
        checks.at_least(0, "steps", pretrain_steps=pretrain_steps)
        checks.one_of(shapes.Pictures, pictures=pictures)
        tokenizer = WordTokenizer(shapes.vocabulary(pictures))
        sizes = TowerSizes(
            image_size=shapes.SIZE, patch_size=6, image_width=48, image_layers=3, image_heads=4, text_width=32, text_layers=3,
            text_heads=4, vocabulary=len(tokenizer), context_length=CONTEXT, embed_dim=48,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(sizes, tokenizer, _END, math.log(20.0))
        if pretrain_steps > 0:
            self._load_or_pretrain(pretrain_steps, seed, pictures)

    def _load_or_pretrain(self, steps: int, seed: int, kind: shapes.Pictures) -> None:
        recipe = f"{steps} {seed} {self.sizes} {' '.join(shapes.vocabulary(kind))} {torch.__version__}"
        name = hashlib.sha256(recipe.encode()).hexdigest()[:12]
        folder = Path(os.environ.get("LIT_METHODS_CACHE") or Path.home() / ".cache" / "lit-methods") / "tiny_towers"
        file = folder / f"{name}.pt"
        if file.is_file():
            self.load_state_dict(torch.load(file, weights_only=True))
            return
        rank_zero_info(f"TinyTowers: pretraining {steps} steps, kept in {file}")
        pretrain(self, steps, seed, kind)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        torch.save(self.state_dict(), part)
        part.replace(file)


def pretrain(towers: TwoTowers, steps: int, seed: int, pictures: shapes.Pictures = "shapes") -> None:
    """Contrastive pretraining, in place: a batch is an image and a caption of each of the 36 classes, so that no two are the same.

    Args:
        towers: To be trained.
        steps: Steps of AdamW, with half a cosine from 3e-3.
        seed: Seed of images and captions.
        pictures: ``shapes`` or ``digits``.
    """
    classes, per_class = shapes.all_classes(pictures), 64
    number = len(classes)
    drawn, _ = shapes.draw_images(per_class, 2 * seed + 1_000_003 if pictures == "digits" else seed + 1_000_003, classes)
    images = to_tensor(drawn).unflatten(0, (number, per_class))
    texts = torch.stack([towers.tokenize(shapes.captions(*own)) for own in classes])  # (classes, captions, L)
    texts = texts[:, :, : int(towers.end_of(texts.flatten(0, 1)).max()) + 1]
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(number)
    parameters = [p for p in towers.parameters() if p.requires_grad]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums whatever the number of threads
    try:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
            for step in range(steps):
                which = (
                    torch.randint(per_class, (number,), generator=generator),
                    torch.randint(texts.shape[1], (number,), generator=generator),
                )
                logits = towers(images[every, which[0]], texts[every, which[1]])
                loss = (F.cross_entropy(logits, every) + F.cross_entropy(logits.T, every)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = 3e-3 * min(1.0, (step + 1) / 40) * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        torch.set_num_threads(threads)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32, about -1 to 1."""
    return torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1


__all__ = ["TinyTowers", "WordTokenizer", "pretrain", "to_tensor"]
