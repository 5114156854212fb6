"""DASS's search as a LightningModule: weights, scores and architecture of a network that holds all candidates.

Maths, paper and origin: :mod:`~lit_methods.architecture_search.dass.core`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_methods import checks, distributed
from lit_methods.architecture_search.dass.core import Order, Values, architecture_gradient
from lit_methods.architecture_search.dass.supernet import SearchNetwork
from lit_methods.architecture_search.genotype import Genotype, describe, draw_genotype, draw_shares
from lit_methods.architecture_search.layers import scored_layers
from lit_methods.callbacks.sparsity.score_masks import Phase, pruning_phase, score_mask
from lit_methods.catalog import Technique
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import warmup_cosine
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel, TableMedia, TablePanel
from lit_methods.runs.folder import run_dir
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="dass",
    title="DASS: Differentiable Architecture Search for Sparse Neural Networks",
    arxiv="2207.06968",
    family="architecture_search",
    form="module",
    classes=(
        "lit_methods.DASSSearch",
        "lit_methods.SearchNetwork",
        "lit_methods.GenotypeClassifier",
        "lit_methods.GenotypeNetwork",
        "lit_methods.SparseConv2d",
        "lit_methods.SparseLinear",
        "lit_methods.callbacks.ScorePruning",
        "lit_methods.datamodules.SearchHalvesDataModule",
    ),
    configs=("dass.yaml", "dass_final.yaml", "dass_scores.yaml"),
    golden=("sparse_layer", "score_init", "genotype", "arch_gradient"),
    claim="With 2 % of the weights of each layer, masks of learned scores end more accurate than masks of the largest magnitudes.",
    summary="Searches cells by gradients while weights are masked by learned scores, then trains and prunes the network of the cells.",
)

_PHASES: tuple[Phase, ...] = ("pretrain", "prune", "finetune")
_KEYS = ("image", "label", "search_image", "search_label")


class DASSSearch(Evaluated):
    """Searches the cells of a network that is to be sparse, with its masks in the loop.

    min over alpha of L_val(w*(alpha) M, alpha), where w* minimises L_train(w M, alpha) and M keeps the share ``keep`` of each layer's
    weights, those of the largest scores. Three phases: ``pretrain`` (all weights), ``prune`` (scores alone are trained, from scores in the
    order of the magnitudes), ``finetune`` (masks are fixed, weights are trained). In each step of the first and the third, alpha moves
    first, on the held-out half, by the gradient through one step of the weights; then the weights, on the training half.

    With ``keep`` 1 and ``prune_steps`` 0 this is DARTS, with ``order: first`` its first-order form.

    Runs: batches of ``SearchHalvesDataModule``, with ``image``, ``label``, ``search_image`` and ``search_label``. Two optimisers, by hand:
    SGD has the weights and scores, Adam alpha alone, so ``trainer.global_step`` and ``max_steps`` count two for a batch in which both step.
    What rests in a phase has no gradient. SGD's memory is empty at the start of a phase, whose learning rate falls along half a cosine, and
    running means and variances begin anew. The
    gradient of alpha is computed in float32 by functional calls, which change neither weights nor running means; over several processes
    its parts are averaged, so that N processes take the step of one with an N times larger batch. The training ends itself when the
    phases are over. A fit without a checkpoint begins with the first phase.

    Saves: the network with alpha, scores and masks, both optimisers, the phase, and which of the two steps came last: a checkpoint between
    the two goes on with the second. In the run's folder ``genotype.json``, after every validation and at the end. ``GenotypeNetwork`` reads
    that file, and checkpoints of a search.

    Refuses: batches without these keys; a network without ``alphas()`` and ``genotype()``; float16 and pure half precision, strategies that
    shard weights, accumulation of gradients; layers of which ``keep`` leaves nothing.

    Args:
        network: Network with ``alphas()`` (name -> parameter) and ``genotype()``, such as ``SearchNetwork``.
        num_classes: Number of classes.
        keep: Share of each layer's weights that stays, in (0, 1].
        pretrain_steps: Batches of the first phase.
        prune_steps: Batches of the second phase.
        finetune_steps: Batches of the third phase.
        order: ``second``: the gradient of alpha by finite differences, through one step of the weights. ``first``: without that step.
            ``exact``: by differentiating twice.
        alpha_while_pruning: Alpha moves in the second phase, too, through one step of the scores.
        learning_rate: Of the weights, at the start of the first and the third phase.
        min_learning_rate: Where these two phases end.
        prune_learning_rate: Of the scores, at the start of the second phase, which ends at 0.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        clip: Largest norm of SGD's gradient.
        alpha_learning_rate: Adam's.
        alpha_betas: Adam's two decay rates.
        alpha_weight_decay: Adam's, joined with the gradient.
        radius: Length of the finite differences' step.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Cells", "dass/genotype", note="Above: the stronger input of a node. Yellow: what the cell puts out."),
        Curve("Loss of the two halves", ("dass/loss", "dass/search_loss"), note="Training half; half that moves alpha.", goal="min"),
        Curve("Held-out accuracy", ("dass/val_accuracy", "dass/test_accuracy"), note="Of the mixture of all candidates.", goal="max"),
        Curve("Held-out loss", ("dass/val_loss", "dass/test_loss"), goal="min"),
        Curve("Phase and density", ("dass/phase", "dass/density"), note="Phase 0: all weights, 1: scores, 2: what stays."),
        Curve("Undecided", ("dass/entropy_normal", "dass/entropy_reduce"), note="Mean entropy of an edge's shares; 1: all are equal."),
        Curve("Kept as by magnitude", ("dass/magnitude_overlap",), note="Share of the kept weights that magnitude would keep, too."),
        Curve("Operations of the cells", ("dass/operations/*",), note="How often each stands in the two cells."),
        ImagePanel("Shares of the operations", "dass/shares", note="Rows: edges. Columns: operations; normal, reducing cell. Black: 1."),
        TablePanel("Genotype", "dass/cells"),
    )

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        keep: float = 0.1,
        pretrain_steps: int = 40,
        prune_steps: int = 20,
        finetune_steps: int = 40,
        order: Order = "second",
        alpha_while_pruning: bool = False,
        learning_rate: float = 0.025,
        min_learning_rate: float = 0.001,
        prune_learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-3,
        clip: float = 5.0,
        alpha_learning_rate: float = 3e-4,
        alpha_betas: tuple[float, float] = (0.5, 0.999),
        alpha_weight_decay: float = 1e-3,
        radius: float = 0.01,
    ) -> None:
        super().__init__()
        checks.literals(DASSSearch, locals())
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.within("(0, 1]", "the share of the weights that stays", keep=keep)
        checks.at_least(0, "batches", pretrain_steps=pretrain_steps, prune_steps=prune_steps, finetune_steps=finetune_steps)
        checks.at_least(1, "batches of all phases together", steps=pretrain_steps + prune_steps + finetune_steps)
        checks.positive(learning_rate=learning_rate, prune_learning_rate=prune_learning_rate, clip=clip, radius=radius)
        checks.positive(alpha_learning_rate=alpha_learning_rate)
        checks.within(f"[0, {learning_rate}]", "at most learning_rate", min_learning_rate=min_learning_rate)
        checks.within("[0, 1)", momentum=momentum)
        checks.at_least(0, weight_decay=weight_decay, alpha_weight_decay=alpha_weight_decay)
        checks.betas(alpha_betas=alpha_betas)
        if not (hasattr(network, "alphas") and hasattr(network, "genotype")):
            kind = type(network).__name__
            raise ValueError(f"{kind} has no alphas() and genotype(), so there is nothing to search: give a network such as SearchNetwork")
        self.save_hyperparameters(ignore=["network"])
        self.automatic_optimization = False
        self.network: SearchNetwork = network  # type: ignore[assignment]
        with checks.naming("DASSSearch"):
            for layer in scored_layers(network).values():
                score_mask(layer.scores, keep)
        self.phase: Phase = "pretrain"
        self.alpha_done, self.weights_done = 0, 0  # batches in which alpha, and the weights, have had their turn
        self._in_step = False
        self._before: Values = {}  # running means before the weights' forward pass, while their step isn't done
        self.eval_loss = MeanMetric()
        self.eval_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, num_classes) logits of the mixture of all candidates."""
        return self.network(images)

    # ---- the run -------------------------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Batches of all phases."""
        hp = self.hparams
        return int(hp["pretrain_steps"] + hp["prune_steps"] + hp["finetune_steps"])

    def setup(self, stage: str) -> None:
        """Begin with the first phase; a checkpoint that is loaded behind this says otherwise.

        Raises:
            ValueError: The strategy shards weights, or the precision is too coarse.
        """
        strategy, precision = type(self.trainer.strategy).__name__, str(self.trainer.precision)
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(f"DASSSearch takes steps with whole weights, but {strategy} shards them: use one process, or strategy='ddp'")
        if precision.startswith(("16-", "bf16-true", "transformer-engine")):
            raise ValueError(f"DASSSearch needs weights and gradients in float32, got precision={precision!r}: use 32-true or bf16-mixed")
        if stage == "fit":
            self.alpha_done = self.weights_done = 0
            self._in_step, self._before = False, {}
            self.phase = "pretrain"
            self._set_layers()

    def _set_layers(self, rescore: bool = False) -> None:
        """Let the layers know the phase."""
        for layer in scored_layers(self.network).values():
            layer.set_keep(1.0 if self.phase == "pretrain" else self.hparams["keep"], self.phase == "prune", rescore)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD for weights and scores, Adam for alpha."""
        hp = self.hparams
        alphas = set(self.network.alphas())
        weights = [parameter for name, parameter in self.network.named_parameters() if name not in alphas]
        moved = torch.optim.SGD(weights, lr=hp["learning_rate"], momentum=hp["momentum"], weight_decay=hp["weight_decay"])
        chosen = torch.optim.Adam(
            list(self.network.alphas().values()),
            lr=hp["alpha_learning_rate"],
            betas=tuple(hp["alpha_betas"]),
            weight_decay=hp["alpha_weight_decay"],
        )
        return [moved, chosen]

    def rate(self) -> float:
        """Learning rate of the weights, or of the scores, in the next step."""
        hp = self.hparams
        phase, done = pruning_phase(self.weights_done, hp["pretrain_steps"], hp["prune_steps"])
        if phase == "prune":
            return float(hp["prune_learning_rate"] * warmup_cosine(done, hp["prune_steps"]))
        length = hp["pretrain_steps"] if phase == "pretrain" else hp["finetune_steps"]
        return float(hp["learning_rate"] * warmup_cosine(done, length, final=hp["min_learning_rate"] / hp["learning_rate"]))

    def moved(self) -> dict[str, nn.Parameter]:
        """What SGD trains in this phase: scores, or everything but scores and alpha."""
        alphas, learns = set(self.network.alphas()), self.phase == "prune"
        scores = {f"{name}.scores" if name else "scores" for name in scored_layers(self.network)}
        return {name: parameter for name, parameter in self.network.named_parameters() if name not in alphas and (name in scores) is learns}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Nothing is left to do where a finished search is resumed."""
        if self.weights_done < self.total:
            return None
        rank_zero_info(f"DASSSearch: all {self.total} batches of the search are done, nothing is searched again")
        self.trainer.should_stop = True
        return -1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        """Alpha on the held-out half, then weights or scores on the training half."""
        missing = [key for key in _KEYS if key not in batch]
        if missing:
            needs = "a search needs labelled images of two halves: use SearchHalvesDataModule"
            raise ValueError(f"DASSSearch: the batch has no {' and no '.join(missing)}, only {', '.join(batch)}: {needs}")
        hp, self._in_step = self.hparams, True
        sgd, adam = self.optimizers()  # type: ignore[misc, attr-defined]
        phase, _ = pruning_phase(self.weights_done, hp["pretrain_steps"], hp["prune_steps"])
        if phase != self.phase:
            before, self.phase = self.phase, phase
            self._set_layers(rescore=before == "pretrain")
            sgd.optimizer.state.clear()
            for part in self.network.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.reset_running_stats()  # of channels that the masks cut off, old means would outlive old variances
        for group in sgd.param_groups:
            group["lr"] = self.rate()
        moved = self.moved()
        logs: dict[str, Tensor | float] = {"phase": float(_PHASES.index(phase)), "density": self._density(), "rate": self.rate()}
        if self.alpha_done == self.weights_done:  # else alpha has moved already, before the checkpoint that this run began with
            if phase != "prune" or hp["alpha_while_pruning"]:
                logs["search_loss"] = self._move_alpha(batch, adam, moved, sgd.optimizer)
            self.alpha_done += 1
        self._before = {name: value.clone() for name, value in self._means().items()}
        loss = F.cross_entropy(self.network(batch["image"]), batch["label"])
        self.manual_backward(loss)
        moving = {id(parameter) for parameter in moved.values()}
        for parameter in self.network.parameters():
            if id(parameter) not in moving:
                parameter.grad = None
        nn.utils.clip_grad_norm_(moved.values(), hp["clip"])
        sgd.step()
        sgd.zero_grad()
        self.weights_done += 1
        self._in_step, self._before = False, {}
        if phase == "prune":
            for layer in scored_layers(self.network).values():
                layer.refresh()
        logs["loss"] = loss.detach()
        self.log_dict({f"dass/{name}": value for name, value in logs.items()}, batch_size=len(batch["label"]))
        if self.weights_done >= self.total:
            self.trainer.should_stop = True
        return None

    def _move_alpha(self, batch: dict[str, Tensor], adam: Any, moved: dict[str, nn.Parameter], sgd: torch.optim.Optimizer) -> Tensor:
        hp, alphas = self.hparams, self.network.alphas()
        memory = {name: sgd.state[parameter].get("momentum_buffer") for name, parameter in moved.items() if parameter in sgd.state}
        found = architecture_gradient(
            self._loss_of(batch["image"], batch["label"]),
            self._loss_of(batch["search_image"], batch["search_label"]),
            dict(alphas),
            dict(moved),
            rate=self.rate(),
            weight_decay=hp["weight_decay"],
            momentum=hp["momentum"],
            buffers={name: value for name, value in memory.items() if value is not None},
            radius=hp["radius"],
            order=hp["order"],
            average=_average if distributed.world_size() > 1 else None,
        )
        for name, alpha in alphas.items():
            alpha.grad = found.gradient[name]
        adam.step()
        adam.zero_grad()
        return found.loss

    def _loss_of(self, images: Tensor, labels: Tensor) -> Callable[[Values, Values], Tensor]:
        """Loss of a batch as a function of alpha and what moves; running means of the network stay as they are."""
        means = self._means()

        def loss(alphas: Values, weights: Values) -> Tensor:
            state = {name: value.clone() for name, value in means.items()} | alphas | weights
            return F.cross_entropy(functional_call(self.network, state, (images,)), labels)

        return loss

    def _means(self) -> Values:
        """Buffers that a forward pass in training moves, by name."""
        return {name: value for name, value in self.network.named_buffers() if name.rpartition(".")[2] != "mask"}

    # ---- state ---------------------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the phase, both counts and the genotype. In the middle of a batch, it is arranged that what isn't done of it comes again."""
        counts = {"phase": self.phase, "alpha_done": self.alpha_done, "weights_done": self.weights_done}
        checkpoint["dass"] = counts | {"genotype": self.network.genotype().to_dict()}
        if self._in_step:
            checkpoint["state_dict"].update({f"network.{name}": value for name, value in self._before.items()})
            for loader in checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", []):
                if loader.get("batches"):  # Lightning begins the batch anew, but the loader has counted it as taken
                    loader["batches"] -= 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the phase of the checkpoint.

        Raises:
            ValueError: The checkpoint is of another module.
        """
        if "dass" not in checkpoint:
            raise ValueError("the checkpoint has no state of a search: it is of another module than DASSSearch")
        state = checkpoint["dass"]
        self.phase, self.alpha_done, self.weights_done = state["phase"], state["alpha_done"], state["weights_done"]
        for layer in scored_layers(self.network).values():  # masks are loaded with the weights
            layer.keep, layer.learning = 1.0 if self.phase == "pretrain" else self.hparams["keep"], self.phase == "prune"

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, labels = self(batch["image"]), batch["label"]
        self.eval_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.eval_accuracy.update(logits.argmax(1), labels)

    @torch.no_grad()
    def _log_evaluation(self, part: Part) -> None:
        logs = {f"{part}_loss": self.eval_loss.compute(), f"{part}_accuracy": self.eval_accuracy.compute()}
        self.eval_loss.reset()
        self.eval_accuracy.reset()
        genotype: Genotype = self.network.genotype()
        shares = {name.removeprefix("alpha_"): alpha.detach().float().softmax(-1) for name, alpha in self.network.alphas().items()}
        for name, share in shares.items():
            largest = torch.tensor(float(max(2, share.shape[-1]))).log()
            logs[f"entropy_{name}"] = torch.special.entr(share).sum(-1).mean() / largest.to(share.device)
        logs |= {f"operations/{name}": torch.tensor(float(count)) for name, count in genotype.counts().items()}
        if layers := scored_layers(self.network).values():
            both = [layer.mask & score_mask(layer.weight, layer.keep) for layer in layers]
            kept = torch.stack([layer.mask.sum() for layer in layers]).sum()
            logs["magnitude_overlap"] = torch.stack([mask.sum() for mask in both]).sum() / kept
        log_global(self, {f"dass/{name}": value for name, value in logs.items()})
        edges = {"normal": genotype.normal, "reduce": genotype.reduce}
        rows = [(kind, 2 + place // 2, *edge) for kind, cell in edges.items() for place, edge in enumerate(cell)]
        self._media = {
            "dass/genotype": ImageMedia(draw_genotype(genotype), describe(genotype)),
            "dass/shares": ImageMedia(
                draw_shares({name: share.cpu().numpy() for name, share in shares.items()}), "shares of the operations on each edge"
            ),
            "dass/cells": TableMedia(("cell", "node", "operation", "predecessor"), tuple(rows)),
        }

    def _density(self) -> float:
        """Share of the scored weights that the forward pass sees."""
        sizes = [(layer.weight.numel(), layer.keep) for layer in scored_layers(self.network).values()]
        return sum(size - int((1 - keep) * size) for size, keep in sizes) / max(1, sum(size for size, _ in sizes))

    def on_validation_end(self) -> None:
        """Write the genotype."""
        self._write()

    def on_fit_end(self) -> None:
        """Write the genotype."""
        self._write()

    def _write(self) -> None:
        trainer: Any = self.trainer
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        folder = run_dir(trainer)  # on every rank: it may broadcast
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.network.genotype().save(folder / "genotype.json")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``logits`` (B, num_classes) of the mixture, and ``label`` as it stands in the batch, where it has one."""
        return {"logits": self(batch["image"])} | ({"label": batch["label"]} if "label" in batch else {})


def _average(values: Values) -> Values:
    """The mean of each over all processes, in one message."""
    packed = torch.cat([value.flatten() for value in values.values()])
    parts = (distributed.sum_over_ranks(packed) / distributed.world_size()).split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


__all__ = ["DASSSearch"]
