"""CoPrompt's consistency term (arXiv:2306.01195) for any module with an image tower and a text tower.

The maths is :func:`lit_methods.prompting.coprompt.core.embedding_consistency`; the whole method, with prompts and adapters, is
``CoPrompt``.
"""

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_methods.callbacks.batch import Key
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.targets import select_modules
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, Panel
from lit_methods.prompting.coprompt.core import Criterion, embedding_consistency, sentence_index


class TwoTowerConsistency(LossTerm):
    """Keeps the embeddings of both towers near those of the towers as they were when fit began, which see perturbed inputs.

    The frozen copies are made in ``setup``: of the weights that the module was built with, before a checkpoint is read. In each step they
    embed ``second_image`` and ``second_text``; the term is 1 - the mean cosine of the images plus that of the texts.

    Needs: two submodules that ``training_step`` calls with one tensor each, and whose output is (B, D) or (C, D) embeddings before
    normalisation or after; and second inputs of the same form. Of a tower that is called several times in a step, the last call counts.
    Logs: ``coprompt/loss``, ``coprompt/consistency_image``, ``coprompt/consistency_text``.
    Saves: a checksum of the frozen copies. Being unsaved themselves, they must be made of the same weights when a run is resumed; other
    weights are refused.
    Doesn't work with strategies that shard weights.

    Args:
        image_tower: Name of the submodule that embeds images.
        text_tower: Name of the submodule that embeds texts.
        second_image: Key (or position) in the batch of another view of the images; None: the very input of the image tower.
        second_text: Key in the batch, or name of a tensor of the module, with other words for the same texts; with one more dimension in
            front, (S, ...), one of S is drawn for each optimiser step, the same on all ranks; None: the very input of the text tower.
        weight: lambda, factor of the term.
        criterion: ``cosine``, ``mse`` or ``l1``, between unit vectors.
        seed: Of the draw.

    Raises:
        ValueError: An unknown criterion, or a negative weight.
    """

    name = "coprompt"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Distance from the frozen towers",
            ("coprompt/consistency_image", "coprompt/consistency_text"),
            note="1 - cosine, before lambda.",
            goal="min",
        ),
    )

    def __init__(
        self,
        image_tower: str,
        text_tower: str,
        second_image: Key = "image_second",
        second_text: Key = None,
        weight: float = 8.0,
        criterion: Criterion = "cosine",
        seed: int = 0,
    ) -> None:
        if criterion not in get_args(Criterion) or weight < 0:
            raise ValueError(f"criterion={criterion!r} must be one of {', '.join(get_args(Criterion))}, and weight={weight} not negative")
        super().__init__([image_tower, text_tower], weight)
        self.image_tower, self.text_tower, self.criterion, self.seed = image_tower, text_tower, criterion, seed
        self.second_image, self.second_text = second_image, second_text
        self._teachers: dict[str, Frozen] = {}
        self._names: dict[str, str] = {}
        self._inputs: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the towers, and watch what they get.

        Raises:
            ValueError: A name matches no submodule or several, both are the same, weights are sharded, or the module optimises manually.
        """
        if stage == "fit":
            if any(word in type(trainer.strategy).__name__ for word in ("FSDP", "DeepSpeed", "ModelParallel")):
                raise ValueError(
                    f"TwoTowerConsistency copies whole towers, but {type(trainer.strategy).__name__} shards them: use strategy='ddp'"
                )
            named = {argument: self._tower(pl_module, argument) for argument in ("image_tower", "text_tower")}
            towers = {argument: tower for argument, (_, tower) in named.items()}
            self._names = {argument: name for argument, (name, _) in named.items()}
            if towers["image_tower"] is towers["text_tower"]:
                raise ValueError(f"image_tower and text_tower are both {self.image_tower!r}: name the two submodules that embed the two")
            self._teachers = {argument: Frozen(copy.deepcopy(tower)) for argument, tower in towers.items()}
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._handles = [tower.register_forward_pre_hook(self._watch(argument, tower)) for argument, tower in towers.items()]

    def _tower(self, pl_module: pl.LightningModule, argument: str) -> tuple[str, nn.Module]:
        pattern = getattr(self, argument)
        try:
            found = select_modules(pl_module, [pattern])
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from None
        if len(found) != 1:
            raise ValueError(f"{argument}={pattern!r} matches {len(found)} submodules, {', '.join(found)}: name one")
        return next(iter(found.items()))

    def _watch(self, argument: str, original: nn.Module) -> Any:
        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if module is original and self._features is not None and self._features.active:  # a copy carries the hook along
                self._inputs[argument] = inputs[0] if len(inputs) == 1 else None

        return keep

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The copies go where the module is."""
        for teacher in self._teachers.values():
            teacher.to(pl_module.device)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The consistency of this step.

        Raises:
            ValueError: A tower's output is no (N, D), its input no single tensor, or a second input isn't there or is of another form.
        """
        names, found = self._names, {}
        for argument, teacher in self._teachers.items():
            own = inputs["features"][names[argument]]
            if not isinstance(own, Tensor) or own.ndim != 2:
                shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
                raise ValueError(f"{argument}={names[argument]!r} puts out {shape}: expected embeddings (N, D)")
            seen = self._inputs.get(argument)
            if not isinstance(seen, Tensor):
                raise ValueError(f"{argument}={names[argument]!r} isn't called with one tensor: name a submodule that is")
            if argument == "image_tower":
                second = seen if self.second_image is None else self._second_image(inputs["batch"])
            else:
                second = self._second_text(inputs["batch"], inputs["module"], seen, inputs["step"])
            if second.shape[:1] != seen.shape[:1]:
                raise ValueError(
                    f"{argument} got {tuple(seen.shape)} and its second input is {tuple(second.shape)}: give another form of the same, "
                    "row by row"
                )
            found[argument] = embedding_consistency(own, teacher(second), self.criterion)
        self._inputs.clear()
        image, text = found["image_tower"], found["text_tower"]
        return image + text, {"consistency_image": image, "consistency_text": text}

    def _second_image(self, batch: Any) -> Tensor:
        there = _part(batch, self.second_image)
        if there is None:
            has = f"the keys {list(batch)}" if isinstance(batch, Mapping) else f"{len(batch)} parts"
            raise ValueError(
                f"the batch has no {self.second_image!r}, another view of the images; it has {has}: name its key by second_image, or give "
                "second_image=None to compare the same images"
            )
        return there

    def _second_text(self, batch: Any, module: nn.Module, seen: Tensor, step: int) -> Tensor:
        if self.second_text is None:
            return seen
        there = _part(batch, self.second_text)
        if there is None and isinstance(self.second_text, str):
            try:
                there = operator.attrgetter(self.second_text)(module)
            except AttributeError:
                there = None
        if not isinstance(there, Tensor):
            raise ValueError(
                f"neither the batch nor {type(module).__name__} has a tensor {self.second_text!r}: name other words for the texts by "
                "second_text, or give second_text=None to compare the same texts"
            )
        there = there.to(seen.device)
        return there[sentence_index(step, len(there), self.seed)] if there.ndim == seen.ndim + 1 else there

    @property
    def state_key(self) -> str:
        """Differs between terms of different towers."""
        return self._generate_state_key(image_tower=self.image_tower, text_tower=self.text_tower, criterion=self.criterion)

    def state_dict(self) -> dict[str, Any]:
        """Sums of the frozen weights: what a resumed run is compared with."""
        return {"checksum": {argument: checksum(teacher.module) for argument, teacher in self._teachers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: The frozen copies differ from those of the run that is resumed.
        """
        for argument, teacher in self._teachers.items():
            saved, here = state["checksum"].get(argument), checksum(teacher.module)
            if saved is not None and abs(saved - here) > 1e-6 * max(abs(saved), abs(here)):
                raise ValueError(
                    f"the {argument} that fit starts from has other weights than in the run that is resumed: build the module with the "
                    "same pretrained weights (or the same seed) as then"
                )

    def _undo(self) -> None:
        super()._undo()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._inputs.clear()


def _part(batch: Any, key: Key) -> Tensor | None:
    if isinstance(batch, Mapping):
        found = batch.get(key)
    elif isinstance(batch, Sequence) and isinstance(key, int) and -len(batch) <= key < len(batch):
        found = batch[key]
    else:
        found = None
    return found if isinstance(found, Tensor) else None


@torch.no_grad()
def checksum(module: nn.Module) -> float:
    """A number that other weights would change: the sum of absolute values of all parameters and buffers, in float64."""
    return float(sum(tensor.double().abs().sum().cpu() for tensor in [*module.parameters(), *module.buffers()]))


__all__ = ["TwoTowerConsistency", "checksum"]
