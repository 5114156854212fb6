"""The built-in images with words: shapes and textures in ten colours, their names, and sentences that describe them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.vision.shapes import KINDS, draw_shapes

COLOURS = {"orange": 0, "lime": 2, "green": 3, "azure": 5, "violet": 7, "rose": 9}  # name -> step of the hue
SHAPES = ("disc", "square", "triangle", "cross", "rows", "checkerboard")  # of KINDS
SIZE = 24  # side of an image in pixels
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "this is a {}.", "{}.")

_LOOKS = {
    "disc": ("a round shape", "something like a coin"),
    "square": ("a shape with equal sides", "something like a box"),
    "triangle": ("a shape with a top", "something like a roof"),
    "cross": ("two bars that meet", "something like a plus"),
    "rows": ("stripes in level lines", "something like a ladder"),
    "checkerboard": ("small fields in turns", "something like a board"),
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


def vocabulary() -> list[str]:
    """All words of all captions, sorted; punctuation is none."""
    words = {word for own in all_classes() for text in captions(*own) for word in split_words(text)}
    return sorted(words)


def split_words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def all_classes() -> list[tuple[str, str]]:
    """(kind, colour) of the 36 classes."""
    return [(kind, colour) for kind in SHAPES for colour in COLOURS]


def task_classes() -> list[tuple[str, str]]:
    """(kind, colour) of the 20 classes of the task, in a fixed order; the first ten are the base classes."""
    order = np.random.default_rng(3).permutation(36)[:20]
    return [all_classes()[int(place)] for place in order]


def draw_images(per_class: int, seed: int, classes: Sequence[tuple[str, str]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of some classes.

    Args:
        per_class: Images of each class.
        seed: Two seeds share no image.
        classes: (kind, colour) of the classes 0, 1, ...

    Returns:
        (N, S, S, 3) uint8 and (N,) classes, those of class 0 first.
    """
    pictures, labels = draw_shapes(100 * per_class, 100, SIZE, seed)
    order = [np.flatnonzero(labels == 10 * KINDS.index(kind) + COLOURS[colour]) for kind, colour in classes]
    return pictures[np.concatenate(order)], np.repeat(np.arange(len(classes)), per_class)


def in_another_light(pictures: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """(N, S, S, 3) uint8 images as the task has them: duller and with more noise than those of pretraining."""
    rng = np.random.default_rng([seed, 77])
    x = pictures.astype(np.float32) / 255
    x = 0.6 * x.mean(axis=-1, keepdims=True) + 0.4 * x + rng.normal(0, 0.15, x.shape).astype(np.float32)
    return (255 * np.clip(x, 0, 1)).astype(np.uint8)
