"""S2FT as a callback: heads and channels are chosen, permuted and trained in anyone's module.

Maths, paper and origin: :mod:`~lit_methods.callbacks.fine_tuning.s2ft.core`.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.fine_tuning.callback import SubsetCallback
from lit_methods.callbacks.fine_tuning.s2ft import core
from lit_methods.callbacks.fine_tuning.s2ft.calibration import activation_squares, weight_gradients
from lit_methods.callbacks.fine_tuning.s2ft.couplings import Coupling, Group, found_groups, given_groups, placed_layers, scored
from lit_methods.callbacks.fine_tuning.s2ft.layers import PlacedLayer
from lit_methods.callbacks.targets import plain_modules
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.seeds import own_seed
from lit_methods.steps import logs_now

TECHNIQUE = Technique(
    slug="s2ft",
    title="S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
    arxiv="2412.06289",
    family="fine_tuning",
    form="callback",
    classes=("lit_methods.callbacks.S2FT",),
    configs=("s2ft.yaml", "s2ft_lm.yaml"),
    golden=("s2ft_block", "s2_linear"),
    claim="At an equal number of trained values and an equal learning rate, S2FT forgets the source data less than LoRA.",
    summary="Fine-tunes a few heads and channels of a transformer as dense slices, with deltas that fuse, switch and run side by side.",
)

Strategy = Literal["R", "W", "A", "S", "G"]
Part = Literal["v", "o", "u", "d"]
_PARTS: tuple[tuple[Part, str, core.Kind], ...] = (
    ("v", "head", "column"),
    ("o", "head", "row"),
    ("u", "channel", "column"),
    ("d", "channel", "row"),
)


class S2FT(SubsetCallback):
    """Trains chosen attention heads and MLP channels of a pretrained transformer, and nothing else of it.

    A head or channel is some rows of the layers that produce it and some columns of the one that consumes it. Shares of all heads and
    channels of the model are chosen, the coupled layers are permuted alike, which leaves the function as it is, so that what is chosen is
    one dense slice, and y = x W^T + b gets a trained term: x[..., s:e] S^T for columns (``o_ratio``, ``d_ratio``), or y[..., s:e] += x S^T
    for rows (``v_ratio``, ``u_ratio``). W is frozen, S starts at 0. For the backward pass only the slice of x is kept.

    Runs: as :class:`SubsetCallback`. Blocks as LLaMA, GPT-2, ViT, BERT and their like have them are found by the names of their layers;
    others are given by ``couplings``. Where heads share keys and values (grouped queries), the groups are permuted and chosen, not heads.
    Layers are chosen on all ranks alike.

    Saves: what :class:`SubsetCallback` saves; the chosen units. A resumed run takes them over, and permutes the base model once.

    Refuses: what :class:`SubsetCallback` refuses; layers that aren't plain linear ones, such as those of torch's ``MultiheadAttention``,
    whose weights are used past the layer; budgets that come to nothing.

    Args:
        v_ratio: Share of all heads whose value rows are trained.
        o_ratio: Share of all heads whose columns of the output projection are trained. Authors, for mathematics: 0.052.
        u_ratio: Share of all channels whose rows of the up projection are trained.
        d_ratio: Share of all channels whose columns of the down projection are trained. Authors: 0.03, with 0.052 for ``o``: 0.02.
        couplings: Layers that belong together; empty: as found. Each is ``consumer``, ``producers``, ``heads``, ``sections``.
        targets: ``fnmatch`` patterns on names of consumers, such as ``*.layers.1?.*``; empty: all.
        strategy: How units are chosen: ``R`` at random; by the norm of weights (``W``), of activations (``A``), by the product of both
            (``S``), or by the norm of gradients (``G``).
        largest: Take the units with the largest scores, else with the smallest; nothing for ``R``.
        calibration_batches: Training batches for ``A``, ``S`` and ``G``.
        also: Patterns on names of submodules that are trained whole beside the slices, such as a new head.
        root: Submodule that the delta is of, such as ``model``; null: the one child with parameters, else the module.
        seed: Seed of the random choice.

    Raises:
        ValueError: An argument outside its range; in ``setup``, something that can't work.
    """

    technique = TECHNIQUE

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Size of what was learned", ("s2ft/delta_norm",), note="Norm of all S together; it starts at 0."),
        Curve("Size of what was learned / size of the slices", ("s2ft/relative_change",), note="Against the base's own values there."),
        TablePanel("Trained slices", "s2ft/layers"),
        TablePanel("Trained values", "s2ft/budget"),
    )

    def __init__(
        self,
        v_ratio: float = 0.0,
        o_ratio: float = 0.0,
        u_ratio: float = 0.0,
        d_ratio: float = 0.03,
        couplings: Sequence[Coupling] = (),
        targets: Sequence[str] = (),
        strategy: Strategy = "R",
        largest: bool = True,
        calibration_batches: int = 1,
        also: Sequence[str] = (),
        root: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(also, root)
        checks.literals(S2FT, locals())
        checks.patterns(targets=targets)
        self.ratios: dict[Part, float] = {"v": v_ratio, "o": o_ratio, "u": u_ratio, "d": d_ratio}
        for name, ratio in self.ratios.items():
            checks.within("[0, 1]", "a share of the heads or channels", **{f"{name}_ratio": ratio})
        if not any(self.ratios.values()):
            raise ValueError("all ratios are 0, so nothing would be trained: give d_ratio, o_ratio, u_ratio or v_ratio")
        checks.at_least(1, "batches", calibration_batches=calibration_batches)
        checks.at_least(0, "a whole number", seed=seed)
        self.couplings, self.targets, self.strategy, self.largest = list(couplings), list(targets), strategy, largest
        self.calibration_batches, self.seed = calibration_batches, seed

    def reset(self) -> None:
        """Forget the last run."""
        super().reset()
        self._layers: dict[str, PlacedLayer] = {}  # name -> permuted layer, trained or not
        self._groups: list[Group] = []
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}

    # ---- setting up --------------------------------------------------------------------------------------------------------------------

    def make_subsets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, PlacedLayer]:
        """Find coupled layers, choose units, and lay out the slices."""
        self._groups = self._find(pl_module)
        resumed = trainer.ckpt_path is not None  # what it chose comes with the checkpoint
        self._chosen = self._choose(trainer, pl_module, "R" if resumed else self.strategy)
        return self._laid_out()

    def _find(self, pl_module: pl.LightningModule) -> list[Group]:
        if self.couplings:
            groups = given_groups(pl_module, self.couplings)
        else:
            groups, left = found_groups(pl_module)
            if left:
                rank_zero_warn(f"S2FT leaves out {'; '.join(f'{name} ({why})' for name, why in list(left.items())[:8])}")
        wanted = {unit for part, unit, _ in _PARTS if self.ratios[part]}
        for pattern in self.targets:
            if not any(fnmatchcase(group.consumer, pattern) for group in groups):
                names = ", ".join(group.consumer for group in groups[:8]) or "none"
                raise ValueError(f"targets={self.targets}: {pattern!r} matches no layer that consumes heads or channels; these are {names}")
        chosen = [group for group in groups if not self.targets or any(fnmatchcase(group.consumer, pattern) for pattern in self.targets)]
        for unit in sorted(wanted):
            if not any(group.unit == unit for group in chosen):
                example = 'couplings=[Coupling("layers.*.down", ["layers.*.up"])]'
                way = f"name layers that belong together, such as {example}, with heads=8 for an attention, or set the ratio to 0"
                raise ValueError(f"no {unit}s are found in {type(pl_module).__name__} by the names of its layers: {way}")
        return [group for group in chosen if group.unit in wanted]

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule, strategy: Strategy) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(own_seed("S2FT", self.seed))
        none = torch.zeros(0, dtype=torch.int64)
        chosen = {group.consumer: {"column": none, "row": none} for group in self._groups}
        modules = plain_modules(pl_module)
        measured: Mapping[str, Tensor] = {}
        names = [name for group in self._groups for name in (group.producers[0], group.consumer)]
        for part, unit, kind in _PARTS:
            groups = [group for group in self._groups if group.unit == unit]
            if not self.ratios[part] or not groups:
                continue
            if strategy == "G":
                measured = measured or weight_gradients(trainer, pl_module, names, self.calibration_batches)
            elif strategy in "AS":
                side = [group.producers[0] if kind == "column" else group.consumer for group in groups]
                measured = activation_squares(trainer, pl_module, side, kind, self.calibration_batches)
            scores = None if strategy == "R" else [scored(group, modules, strategy, kind, measured) for group in groups]
            units = core.select_units([group.units for group in groups], self.ratios[part], generator, scores, self.largest)
            for group, own in zip(groups, units, strict=True):
                chosen[group.consumer][kind] = own
        if not any(len(own["column"]) + len(own["row"]) for own in chosen.values()):
            total = {unit: sum(group.units for group in self._groups if group.unit == unit) for unit in ("head", "channel")}
            raise ValueError(f"the ratios come to nothing of {total['head']} heads and {total['channel']} channels: raise them")
        return {name: (own["column"], own["row"]) for name, own in chosen.items()}

    def _laid_out(self) -> dict[str, PlacedLayer]:
        self._layers = placed_layers(self._module, self._groups, self._chosen)
        return {f"{name}.weight": layer for name, layer in self._layers.items() if layer.slice is not None}

    def attach(self) -> None:
        """Permute all coupled layers, and put the slices on."""
        for layer in self._layers.values():
            layer.attach()

    def detach(self) -> None:
        """Fuse, and permute back."""
        for layer in self._layers.values():
            layer.detach()

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how far the slices have moved."""
        if logs_now(pl_module):
            sizes = [torch.stack([layer.values.norm(), layer.base.float().norm()]) for layer in self._subsets.values()]
            learned, base = torch.stack(sizes).square().sum(0).sqrt()
            self.log_step(pl_module, {"delta_norm": learned, "relative_change": learned / base})

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Chosen units, and of each slice the base's values and what was learned."""
        layers = {name: {"delta": layer.values.detach(), "base": layer.base.clone()} for name, layer in self._subsets.items()}
        return {"chosen": {name: list(units) for name, units in self._chosen.items()}, "layers": layers}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Lay out what the checkpoint chose."""
        chosen = {name: (column, row) for name, (column, row) in state["chosen"].items()}
        if odd := sorted(set(chosen) ^ set(self._chosen)):
            raise ValueError(f"the checkpoint's coupled layers are others ({', '.join(odd[:4])}): resume with the same arguments of S2FT")
        if any(not torch.equal(a, b) for name in chosen for a, b in zip(chosen[name], self._chosen[name], strict=True)):
            self.detach()
            self._chosen = chosen
            self._subsets = self._laid_out()
            self.attach()
        for name, layer in self._subsets.items():
            saved = state["layers"][name]
            if saved["delta"].shape != layer.values.shape:
                raise ValueError(
                    f"the slice of {name} was {tuple(saved['delta'].shape)}, and is {tuple(layer.values.shape)} in this module"
                )
            layer.base.copy_(saved["base"])
            layer.values.copy_(saved["delta"])

    def notes(self) -> dict[str, Any]:
        """Ratios and strategy."""
        return {**{f"{part}_ratio": ratio for part, ratio in self.ratios.items()}, "strategy": self.strategy, "seed": self.seed}

    def dashboard_media(self) -> dict[str, Media]:
        """What is trained, by layer and in all."""
        if not self._subsets:
            return {}
        rows = []
        for name, layer in self._subsets.items():
            assert layer.slice is not None
            what = "rows" if layer.slice.kind == "column" else "columns"
            rows.append((name, what, layer.slice.width, layer.values.numel(), float(layer.values.detach().norm())))
        count, total = self.counts()
        budget = (("trained values", count), ("values of the module", total), ("share", count / total))
        return {
            "s2ft/layers": TableMedia(("weight", "trained", "how many", "values", "norm of S"), tuple(rows)),
            "s2ft/budget": TableMedia(("what", "value"), budget),
        }


__all__ = ["S2FT"]
