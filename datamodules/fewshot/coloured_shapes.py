"""The built-in images with words: shapes, textures and real digits in colours, their names, and sentences that describe them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.vision.shapes import KINDS, draw_shapes, paint

COLOURS = {"orange": 0, "lime": 2, "green": 3, "azure": 5, "violet": 7, "rose": 9}  # name -> step of the hue
SHAPES = ("disc", "square", "triangle", "cross", "rows", "checkerboard")  # of KINDS
DIGITS = ("zero", "one", "two", "three", "four", "five")  # of scikit-learn's handwritten digits
Pictures = Literal["shapes", "digits"]
_KINDS: dict[Pictures, tuple[str, ...]] = {"shapes": SHAPES, "digits": DIGITS}
SIZE = 24  # side of an image in pixels
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "this is a {}.", "{}.")

_LOOKS = {
    "disc": ("a round shape", "something like a coin"),
    "square": ("a shape with equal sides", "something like a box"),
    "triangle": ("a shape with a top", "something like a roof"),
    "cross": ("two bars that meet", "something like a plus"),
    "rows": ("stripes in level lines", "something like a ladder"),
    "checkerboard": ("small fields in turns", "something like a board"),
    "zero": ("a closed loop", "something like an egg"),
    "one": ("a single stroke", "something like a stick"),
    "two": ("a bow on a level line", "something like a swan"),
    "three": ("a pair of open bows", "something like a pretzel"),
    "four": ("strokes that cross", "something like a sail"),
    "five": ("a bow below a bar", "something like a hook"),
}
_HUES = {
    "orange": ("like fire", "in a warm tone"),
    "lime": ("like fresh leaves", "in a bright tone"),
    "green": ("like grass", "in the tone of a meadow"),
    "azure": ("like the sky", "in a cool tone"),
    "violet": ("like lavender", "in a dark tone"),
    "rose": ("like a bloom", "in a soft tone"),
}


def class_name(kind: str, colour: str) -> str:
    """Such as ``green disc``."""
    return f"{colour} {kind}"


def sentences(kind: str, colour: str) -> list[str]:
    """Ten sentences that describe a class; each leaves out the name of its kind, of its colour, or of both."""
    both = [f"{look} {hue}." for look in _LOOKS[kind] for hue in _HUES[colour]]
    return both + [f"{look}, {colour}." for look in _LOOKS[kind]] + [f"a {kind} {hue}." for hue in _HUES[colour]] + [
        f"{hue}, {look}." for look, hue in zip(_LOOKS[kind], _HUES[colour], strict=True)
    ]  # fmt: skip


def captions(kind: str, colour: str) -> list[str]:
    """What a picture of the class may be called when the two towers are pretrained."""
    return [template.format(class_name(kind, colour)) for template in TEMPLATES] * 2 + sentences(kind, colour)


def vocabulary(pictures: Pictures = "shapes") -> list[str]:
    """All words of all captions, sorted; punctuation is none."""
    words = {word for own in all_classes(pictures) for text in captions(*own) for word in split_words(text)}
    return sorted(words)


def split_words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def all_classes(pictures: Pictures = "shapes") -> list[tuple[str, str]]:
    """(kind, colour) of the 36 classes."""
    return [(kind, colour) for kind in _KINDS[pictures] for colour in COLOURS]


def task_classes(pictures: Pictures = "shapes") -> list[tuple[str, str]]:
    """(kind, colour) of the 20 classes of the task, in a fixed order; the first ten are the base classes."""
    order = np.random.default_rng(3).permutation(36)[:20]
    return [all_classes(pictures)[int(place)] for place in order]


def draw_images(per_class: int, seed: int, classes: Sequence[tuple[str, str]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of some classes.

    Args:
        per_class: Images of each class.
        seed: Two seeds share no image; digits of an even seed and of an odd one are in no case the same handwriting.
        classes: (kind, colour) of the classes 0, 1, ..., all shapes or all digits.

    Returns:
        (N, S, S, 3) uint8 and (N,) classes, those of class 0 first.
    """
    if classes[0][0] in DIGITS:
        return _draw_digits(per_class, seed, classes), np.repeat(np.arange(len(classes)), per_class)
    pictures, labels = draw_shapes(100 * per_class, 100, SIZE, seed)
    order = [np.flatnonzero(labels == 10 * KINDS.index(kind) + COLOURS[colour]) for kind, colour in classes]
    return pictures[np.concatenate(order)], np.repeat(np.arange(len(classes)), per_class)


def _draw_digits(per_class: int, seed: int, classes: Sequence[tuple[str, str]]) -> NDArray[np.uint8]:
    """Handwritten digits of 14 to 20 pixels in random places, painted as the shapes are."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng([seed, 41])
    cover, hues = np.zeros((len(classes) * per_class, SIZE, SIZE)), []
    for number, (kind, colour) in enumerate(classes):
        pool = np.flatnonzero(digits.target == DIGITS.index(kind))[seed % 2 :: 2]
        for place, chosen in enumerate(rng.choice(pool, per_class, replace=per_class > len(pool)), start=number * per_class):
            side = int(rng.integers(14, 21))
            top, left = rng.integers(SIZE - side + 1, size=2)
            drawn = torch.from_numpy(digits.images[chosen] / 16)[None, None]
            larger = F.interpolate(drawn, (side, side), mode="bilinear", align_corners=False)
            cover[place, top : top + side, left : left + side] = larger[0, 0].numpy()
            hues.append((COLOURS[colour] + 0.2 + 0.6 * rng.random()) / 10)
    return paint(cover, np.array(hues), rng)


def in_another_light(pictures: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """(N, S, S, 3) uint8 images as the task has them: duller and with more noise than those of pretraining."""
    rng = np.random.default_rng([seed, 77])
    x = pictures.astype(np.float32) / 255
    x = 0.6 * x.mean(axis=-1, keepdims=True) + 0.4 * x + rng.normal(0, 0.15, x.shape).astype(np.float32)
    return (255 * np.clip(x, 0, 1)).astype(np.uint8)
