"""SaRA as a callback: small weights of anyone's module are chosen, trained alone, and kept low in rank.

Maths, paper and origin: :mod:`~lit_methods.callbacks.fine_tuning.sara.core`.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_methods import checks
from lit_methods.callbacks.fine_tuning.callback import SubsetCallback
from lit_methods.callbacks.fine_tuning.sara import core
from lit_methods.callbacks.fine_tuning.sara.entries import SelectedLayer
from lit_methods.callbacks.fine_tuning.sara.optimizer import MaskedAdamW
from lit_methods.callbacks.sparsity.store import listed
from lit_methods.callbacks.targets import plain_modules, select_modules
from lit_methods.catalog import Technique
from lit_methods.optim import repoint
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.seeds import own_seed
from lit_methods.steps import training_length

TECHNIQUE = Technique(
    slug="sara",
    title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    arxiv="2409.06633",
    family="fine_tuning",
    form="callback",
    classes=("lit_methods.callbacks.SaRA", "lit_methods.callbacks.MaskedAdamW"),
    configs=("sara.yaml",),
    golden=("sara_optimizer", "nuclear_norm"),
    claim="Training only the 20 % of the weights that are smallest in magnitude adapts a network to a new domain.",
    summary="Fine-tunes the smallest weights of a pretrained network and no other, with gradients of these alone and a penalty of rank.",
)

Choose = Literal["smallest", "largest", "random"]

_LARGEST_TABLE = 64  # rows
_LARGEST_SVD = 1024  # rows or columns of a matrix whose effective rank is shown


class SaRA(SubsetCallback):
    """Trains the weights that are smallest in magnitude, and nothing else of a module.

    Chosen are the entries with |P| < tau of all tensors, biases and norms included. Once, after ``progressive_steps`` optimiser steps,
    those that have grown past tau are frozen where they are, and the others go on. In each step one matrix, drawn at random, gets the
    gradient of lambda ||P * M||_*, the nuclear norm of its chosen values, which keeps what is trained low in rank.

    Runs: as :class:`SubsetCallback`. Each tensor stays as a frozen one, and its chosen entries are a vector p beside it, which alone has a
    gradient, is averaged over ranks, clipped and stepped: Adam and AdamW are replaced by :class:`MaskedAdamW` with the same groups and
    schedules, which drops the moments of what is frozen; any other optimiser is kept. The rank's gradient is added when gradients are
    unscaled and averaged, before clipping, of the same matrix on all ranks.

    Saves: what :class:`SubsetCallback` saves; the chosen entries, and which of them are still trained.

    Refuses: what :class:`SubsetCallback` refuses; a threshold that no entry lies below. Left out, with a warning: tied tensors, and those
    that ``weight_norm`` and the like make in the forward pass.

    Args:
        threshold: tau. Authors, for Stable Diffusion 1.5: 2e-3 (about 50 million entries), 8e-4 (20), 2e-4 (5). Null: by ``share``.
        share: Instead of ``threshold``: the share of all entries that lies below it, in (0, 1].
        choose: ``smallest``; to compare with: the ``largest`` or a ``random`` share, without re-selection.
        progressive_steps: Optimiser steps before the re-selection; null: half of the training, as in the paper; -1: never.
        rank_weight: lambda of the nuclear norm; 0: none.
        rank_min_size: Only matrices with more rows and more columns have their rank penalised.
        rank_min_entries: And those with more trained entries.
        targets: ``fnmatch`` patterns on submodule names; empty: all tensors that would be trained.
        skip: Patterns on submodule names whose tensors stay frozen.
        also: Patterns on names of submodules that are trained whole beside the entries, such as a new head.
        root: Submodule that the delta is of, such as ``model``; null: the one child with parameters, else the module.
        seed: Seed of the choice of matrices.

    Raises:
        ValueError: An argument outside its range; in ``setup``, something that can't work.
    """

    technique = TECHNIQUE

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Share of the chosen entries that is trained", ("sara/active_share",), note="1, and less from the re-selection on."),
        Curve("Nuclear norm of the drawn matrix x lambda", ("sara/rank_loss",), note="Another matrix in each step.", goal="min"),
        TablePanel(
            "Chosen entries", "sara/layers", note="Effective rank: exp of the entropy of the singular values of the chosen entries."
        ),
        TablePanel("Trained values", "sara/budget"),
    )

    def __init__(
        self,
        threshold: float | None = 2e-3,
        share: float | None = None,
        choose: Choose = "smallest",
        progressive_steps: int | None = None,
        rank_weight: float = 5e-4,
        rank_min_size: int = 64,
        rank_min_entries: int = 100,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        also: Sequence[str] = (),
        root: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(also, root)
        checks.patterns(targets=targets, skip=skip)
        checks.literals(SaRA, locals())
        checks.positive(threshold=threshold)
        checks.within("(0, 1]", "a share of all entries", share=share)
        if (threshold is None) == (share is None):
            raise ValueError(f"threshold is {threshold} and share is {share}: give one of them, and null for the other")
        checks.at_least(-1, "optimiser steps, or -1", progressive_steps=progressive_steps)
        if choose != "smallest" and (share is None or progressive_steps != -1):
            raise ValueError(f"choose={choose!r} knows no threshold: give share, threshold=null and progressive_steps=-1")
        checks.at_least(0, rank_weight=rank_weight, rank_min_size=rank_min_size, rank_min_entries=rank_min_entries)
        checks.at_least(0, "a whole number", seed=seed)
        self.threshold, self.share, self.choose, self.progressive_steps = threshold, share, choose, progressive_steps
        self.rank_weight, self.rank_min_size, self.rank_min_entries = rank_weight, rank_min_size, rank_min_entries
        self.targets, self.skip, self.seed = list(targets), list(skip), seed

    def reset(self) -> None:
        """Forget the last run."""
        super().reset()
        self._subsets: dict[str, SelectedLayer] = {}
        self._tau = 0.0
        self._progressive = -1
        self._matrices: list[str] = []  # whose rank may be penalised
        self._handles: list[Any] = []
        self._rank_loss: Tensor | None = None

    # ---- setting up --------------------------------------------------------------------------------------------------------------------

    def make_subsets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, SelectedLayer]:
        """Choose the entries below tau."""
        places = self._places(pl_module)
        weights = {name: getattr(module, attribute) for name, (module, attribute) in places.items()}
        self._matrices = [name for name, own in weights.items() if own.ndim == 2 and min(own.shape) > self.rank_min_size]
        found = {name: mask.flatten().nonzero().flatten() for name, mask in self._masks(weights).items()}
        if not any(map(len, found.values())) and trainer.ckpt_path is None:  # a resumed run brings its own choice
            smallest = min(float(weight.detach().abs().min()) for weight in weights.values() if weight.numel())
            raise ValueError(
                f"no entry lies below the threshold {self._tau:g}, the smallest is {smallest:g}: raise threshold, or give share"
            )
        return {name: SelectedLayer(*places[name], index) for name, index in found.items() if len(index)}

    def _masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.choose == "random":
            assert self.share is not None
            generator = torch.Generator().manual_seed(own_seed("SaRA", self.seed))
            return {name: torch.rand(weight.shape, generator=generator) < self.share for name, weight in weights.items()}
        if self.threshold is not None:
            self._tau = self.threshold
        else:
            assert self.share is not None
            self._tau = core.threshold_of(weights.values(), self.share if self.choose == "smallest" else 1 - self.share)
        masks = {name: core.small_weights(weight, self._tau) for name, weight in weights.items()}
        return masks if self.choose == "smallest" else {name: ~mask for name, mask in masks.items()}

    def _places(self, pl_module: pl.LightningModule) -> dict[str, tuple[nn.Module, str]]:
        """Name of each tensor that may be trained -> its owner and its name there."""
        modules = plain_modules(pl_module)
        for pattern in self.skip:
            if not any(fnmatchcase(name, pattern) for name in modules):
                raise ValueError(f"skip pattern {pattern!r} matches no submodule of {type(pl_module).__name__}: correct it or leave it out")
        wanted = set(select_modules(pl_module, self.targets)) if self.targets else set(modules)
        kept = {id(parameter) for parameter in self._kept.values()}
        owners: dict[int, list[str]] = {}
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        found: dict[str, tuple[nn.Module, str]] = {}
        left: dict[str, str] = {}
        for name, module in modules.items():
            if name not in wanted or any(fnmatchcase(name, pattern) for pattern in self.skip):
                continue
            chains: Any = getattr(module, "parametrizations", {})
            made = isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f".{name}."
            for own, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{own}" if name else own
                if not parameter.requires_grad or id(parameter) in kept:
                    continue
                stem = own.removesuffix("_g").removesuffix("_v").removesuffix("_orig")
                if made or own in chains or (stem != own and isinstance(getattr(module, stem, None), Tensor)):
                    left[full] = "the forward pass makes the weight of it"
                elif len(owners[id(parameter)]) > 1:
                    left[full] = "tied"
                else:
                    found[full] = (module, own)
        if left:
            rank_zero_warn(f"SaRA leaves out tensors that it can't train in part: {listed(left)}")
        if not found:
            raise ValueError(f"{type(pl_module).__name__} has no tensor to train: choose others by targets, or unfreeze the module first")
        return found

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Adam, and listen to the optimisers.

        Raises:
            ValueError: No optimiser holds the entries, or half of a training without an end is asked for.
        """
        super().on_fit_start(trainer, pl_module)
        steps = self.progressive_steps
        if steps is None:
            steps = training_length(pl_module, what="half of the training before SaRA's re-selection", instead="progressive_steps") // 2
        self._progressive = steps
        optimizers = []
        for old in trainer.optimizers:
            new = MaskedAdamW.from_adam(old) if MaskedAdamW.can_replace(old) else old
            for config in trainer.lr_scheduler_configs:
                repoint(config.scheduler, old, new)
            optimizers.append(new)
        trainer.strategy.optimizers = optimizers
        self._follow()
        self._handles = [optimizer.register_step_post_hook(lambda *_: self._follow()) for optimizer in optimizers]

    def _follow(self) -> None:
        for layer in self._subsets.values():
            layer.follow()

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Select again, and add the gradient of the rank's penalty; gradients are whole and unscaled."""
        step = trainer.global_step + 1
        if core.is_reselection(step, self._progressive):
            self._select_again(trainer)
        for layer in self._subsets.values():
            if layer.active is not None and layer.values.grad is not None:
                layer.values.grad.mul_(layer.active)  # what is frozen counts in no norm
        self._rank_loss = self._penalise(step)

    def _select_again(self, trainer: pl.Trainer) -> None:
        for layer in self._subsets.values():
            if layer.active is not None:  # another optimiser's step with the same number
                continue
            whole = torch.ones_like(layer.values, dtype=torch.bool)
            layer.freeze_outside(core.still_small(whole, layer.values, self._tau))
            for optimizer in trainer.optimizers:
                held = any(layer.values is own for group in optimizer.param_groups for own in group["params"])
                if held and isinstance(optimizer, MaskedAdamW) and layer.active is not None:
                    optimizer.set_mask(layer.values, layer.active)

    def _penalise(self, step: int) -> Tensor | None:
        """Add lambda (U V^T) * M to the gradient of one matrix; what was penalised."""
        if not self.rank_weight or not self._matrices:
            return None
        generator = torch.Generator().manual_seed(own_seed(f"SaRA {step}", self.seed))
        layer = self._subsets.get(self._matrices[int(torch.randint(len(self._matrices), (), generator=generator))])
        if layer is None or layer.values.grad is None or len(layer.values) <= self.rank_min_entries:
            return torch.zeros((), device=self._module.device)
        mask = layer.mask()
        enough = mask.sum() > self.rank_min_entries  # a tensor: nothing waits for the device
        loss, grad = core.nuclear_norm(layer.weight, mask, self.rank_weight)
        layer.values.grad += (grad.flatten().index_select(0, layer.index) * enough).to(layer.values.grad.dtype)
        return loss * enough

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what is trained, and the penalty."""
        chosen = sum(len(layer.values) for layer in self._subsets.values())
        counts = [len(own.values) if own.active is None else own.active.sum() for own in self._subsets.values()]
        figures: dict[str, Tensor | float] = {"active_share": sum(counts) / max(1, chosen)}
        if self._rank_loss is not None:
            figures["rank_loss"] = self._rank_loss
        self.log_step(pl_module, figures)

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Chosen entries, their values, and which are still trained."""
        parts = {}
        for name, layer in self._subsets.items():
            parts[name] = {"index": layer.index, "values": layer.values.detach()}
            if layer.active is not None:
                parts[name]["active"] = layer.active
        return {"entries": parts, "threshold": self._tau}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the checkpoint's choice."""
        saved: Mapping[str, Mapping[str, Tensor]] = state["entries"]
        same = saved.keys() == self._subsets.keys() and all(
            torch.equal(saved[name]["index"], layer.index.cpu()) for name, layer in self._subsets.items()
        )
        if not same:
            self.detach()
            places = self._restorable(saved)
            self._subsets = {name: SelectedLayer(*places[name], own["index"].long()) for name, own in saved.items()}
            self.attach()
        self._tau = state["threshold"]
        for name, layer in self._subsets.items():
            layer.values.copy_(saved[name]["values"])
            layer.active = layer.frozen = None
            if "active" in saved[name]:
                layer.freeze_outside(saved[name]["active"].to(layer.values.device))
            layer.follow()

    def _restorable(self, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[nn.Module, str]]:
        modules = plain_modules(self._module)
        places = {}
        for name, own in saved.items():
            owner, _, attribute = name.rpartition(".")
            weight = getattr(modules.get(owner), attribute, None)
            if not isinstance(weight, nn.Parameter) or weight.numel() <= int(own["index"][-1]):
                raise ValueError(f"the checkpoint has trained entries of {name}, which this module lacks: resume with the same module")
            places[name] = (modules[owner], attribute)
        return places

    def notes(self) -> dict[str, Any]:
        """The threshold."""
        return {"threshold": self._tau}

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary module; nothing listens to the optimisers any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        super().leave(trainer, pl_module)

    @torch.no_grad()
    def dashboard_media(self) -> dict[str, Media]:
        """What is trained, by tensor and in all."""
        if not self._subsets:
            return {}
        rows = []
        for name, layer in list(self._subsets.items())[:_LARGEST_TABLE]:
            weight, chosen = layer.weight, len(layer.values)
            active = chosen if layer.active is None else int(layer.active.sum())
            small = weight.ndim == 2 and max(weight.shape) <= _LARGEST_SVD
            rank = round(float(core.effective_rank(weight * layer.mask())), 2) if small else None
            rows.append((name, weight.numel(), chosen, active, rank))
        count, total = self.counts()
        budget = (("trained values", count), ("values of the module", total), ("share", count / total), ("threshold", self._tau))
        columns = ("tensor", "entries", "chosen", "still trained", "effective rank")
        return {"sara/layers": TableMedia(columns, tuple(rows)), "sara/budget": TableMedia(("what", "value"), budget)}


__all__ = ["SaRA"]
