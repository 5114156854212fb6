"""CoPrompt's consistency term (arXiv:2306.01195) for any module with an image tower and a text tower.

The maths is :func:`lit_methods.prompting.coprompt.core.embedding_consistency`; the whole method, with prompts and adapters, is
``CoPrompt``.
"""

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.features import one_submodule
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.targets import refuse_lazy, refuse_sharded
from lit_methods.callbacks.twin import copy_of
from lit_methods.checks import at_least, naming, one_of
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, Panel
from lit_methods.prompting.coprompt.core import Criterion, embedding_consistency, sentence_index


class TwoTowerConsistency(LossTerm):
    """Keeps the embeddings of both towers near those of the towers as they were when fit began, which see perturbed inputs.

    The term is 1 - the mean cosine of the images plus that of the texts, between the tower and its frozen copy.

    Runs: the frozen copies are made in ``setup``, of the weights that the module was built with, before a checkpoint is read. In each
    training step they embed ``second_image`` and ``second_text``. Of a tower that is called several times in a step, the last call counts.
    Saves: a checksum of the frozen copies. Being unsaved themselves, they must be made of the same weights when a run is resumed.
    Refuses: other weights than in the run that is resumed; strategies that shard weights; towers that ``training_step`` doesn't call with
    one tensor, or whose output isn't (B, D) or (C, D) embeddings, before normalisation or after; second inputs of another form.

    Args:
        image_tower: Name of the submodule that embeds images.
        text_tower: Name of the submodule that embeds texts.
        second_image: Key (or position) in the batch of another view of the images; None: the very input of the image tower.
        second_text: Key in the batch, or name of a tensor of the module, with other words for the same texts; with one more dimension in
            front, (S, ...), one of S is drawn for each optimiser step, the same on all ranks; None: the very input of the text tower.
        weight: lambda, factor of the term.
        criterion: ``cosine``, ``mse`` or ``l1``, between unit vectors.
        seed: Seed of the draw.

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
        one_of(Criterion, criterion=criterion)
        at_least(0, weight=weight)
        super().__init__([image_tower, text_tower], weight)
        self.image_tower, self.text_tower, self.criterion, self.seed = image_tower, text_tower, criterion, seed
        self.second_image, self.second_text = second_image, second_text
        self._teachers: dict[str, Frozen] = {}
        self._names: dict[str, str] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the towers.

        Raises:
            ValueError: A name matches no submodule or several, both are the same, weights are sharded, or the module optimises manually.
        """
        if stage == "fit":
            refuse_sharded(trainer, "TwoTowerConsistency")
        super().setup(trainer, pl_module, stage)

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Copy the towers, and hook into them."""
        with naming("TwoTowerConsistency"):
            towers = {name: one_submodule(pl_module, getattr(self, name), name) for name in ("image_tower", "text_tower")}
            self._names = {argument: name for argument, (name, _) in towers.items()}
            if towers["image_tower"][1] is towers["text_tower"][1]:
                raise ValueError(f"image_tower and text_tower are both {self.image_tower!r}: name the two submodules that embed the two")
            for _, tower in towers.values():
                refuse_lazy(tower, "TwoTowerConsistency")
            self._teachers = {argument: Frozen(copy_of(tower)) for argument, (_, tower) in towers.items()}
        super().hook_in(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The copies go where the module is."""
        for teacher in self._teachers.values():
            teacher.to(pl_module.device)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The consistency of this step.

        Raises:
            ValueError: A tower's output is no (N, D), its input no single tensor, or a second input isn't there or is of another form.
        """
        batch, module, distances = inputs["batch"], inputs["module"], {}
        for argument, teacher in self._teachers.items():
            name = self._names[argument]
            embedded = inputs["features"][name]
            if not isinstance(embedded, Tensor) or embedded.ndim != 2:
                shape = tuple(embedded.shape) if isinstance(embedded, Tensor) else type(embedded).__name__
                raise ValueError(f"{argument}={name!r} puts out {shape}: expected embeddings (N, D)")
            seen, _ = inputs["feature_arguments"][name][-1]
            if len(seen) != 1 or not isinstance(seen[0], Tensor):
                raise ValueError(f"{argument}={name!r} isn't called with one tensor: name a submodule that is")
            is_image = argument == "image_tower"
            second = self._second_image(batch, seen[0]) if is_image else self._second_text(batch, module, seen[0], inputs["step"])
            if second.shape[:1] != seen[0].shape[:1]:
                raise ValueError(
                    f"{argument} got {tuple(seen[0].shape)} and its second input is {tuple(second.shape)}: give another form of the same, "
                    "row by row"
                )
            distances[argument] = embedding_consistency(embedded, self.run_again(second, teacher).output, self.criterion)
        image, text = distances["image_tower"], distances["text_tower"]
        return image + text, {"consistency_image": image, "consistency_text": text}

    def _second_image(self, batch: Any, seen: Tensor) -> Tensor:
        if self.second_image is None:
            return seen
        needed = "TwoTowerConsistency needs another view of the images (second_image=None compares the same ones)"
        return find_in_batch(batch, self.second_image, ("", 0), "second_image", needed)

    def _second_text(self, batch: Any, module: nn.Module, seen: Tensor, step: int) -> Tensor:
        key = self.second_text
        if key is None:
            return seen
        try:
            text: Any = find_in_batch(batch, key, ("", 0), "second_text")
        except ValueError:  # the module's, then
            text = module
            for name in str(key).split("."):
                text = getattr(text, name, None)
        if not isinstance(text, Tensor):
            raise ValueError(
                f"neither the batch nor {type(module).__name__} has a tensor {key!r}: name other words for the texts by second_text, or "
                "give second_text=None to compare the same texts"
            )
        text = text.to(seen.device)
        return text[sentence_index(step, len(text), self.seed)] if text.ndim == seen.ndim + 1 else text

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


@torch.no_grad()
def checksum(module: nn.Module) -> float:
    """A number that other weights would change: the sum of absolute values of all parameters and buffers, in float64."""
    return float(sum(tensor.double().abs().sum().cpu() for tensor in [*module.parameters(), *module.buffers()]))


__all__ = ["TwoTowerConsistency", "checksum"]
