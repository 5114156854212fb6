"""SimMatchV2: semi-supervised learning by the consistency of a graph of views (arXiv:2308.06692).

Golden vectors come from mingkai-zheng/SimMatchV2@f0e054c. The maths stand in :mod:`~lit_methods.semi.simmatchv2.core`.
"""

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.averages import cosine_decay, ema_update
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows, rank, world_size
from lit_methods.panels import Curve, Panel
from lit_methods.seeds import own_seed
from lit_methods.semi.base import Schedule, SemiBatch, SemiSupervised
from lit_methods.semi.simmatchv2.core import GraphConsistency
from lit_methods.steps import training_length

TECHNIQUE = Technique(
    slug="simmatchv2",
    title="SimMatchV2: Semi-Supervised Learning with Graph Consistency",
    arxiv="2308.06692",
    family="semi",
    form="module",
    classes=("lit_methods.SimMatchV2", "lit_methods.PropagationProbe", "lit_methods.datamodules.SemiSupervisedDataModule"),
    configs=("simmatchv2.yaml",),
    golden=("losses", "lr_schedule", "ema_update"),
    claim=(
        "Propagation over a graph of labelled neighbours makes pseudo labels likelier to be right, for a linear classifier on small digits."
    ),
    summary="Few labels: two views of an image agree in their classes, and in their similarities to other images.",
)


class SimMatchV2(SemiSupervised):
    """Pseudo labels propagated over a graph of labelled neighbours, and similarities that weak and strong views share.

    The loss is H(y, p(x)) + lambda_nn nn + lambda_ee ee + lambda_ne ne: cross-entropies of the strong views with the propagated label, with
    the weak view's similarities, and with its classes as read through their own similarities. A second network, the moving average of the
    trained one, gives predictions and embeddings of weak views. Both read the feature behind a layer norm. A bank holds the embedding of
    every labelled image, a queue those of the last unlabelled ones with their predictions. An empty queue makes no finite node-edge loss,
    which is 0 then; while it fills, its classes' mass is below 1 and the loss too large by that, as in the authors' code.

    Runs: with a datamodule that has ``labelled_classes``, the classes of the labelled images by their index (``SemiSupervisedDataModule``).
    Evaluation uses the trained network. Works with any precision (graph and losses are computed in float32), DDP (banks hold the rows of
    all ranks) and accumulation (banks advance once for each micro-batch).

    Saves: both networks, banks, pointer, alignment.

    Refuses: another number of labelled images than the data have; a ``bank_size`` that the unlabelled images of a step don't divide.

    Args:
        backbone: (B, ...) images -> (B, feature_dim).
        feature_dim: Width of the backbone's output.
        num_classes: C.
        num_labelled: N, labelled images of the datamodule.
        embedding_dim: D of the embeddings.
        norm_features: Layer norm behind the backbone.
        bank_size: K, images in the queue; a multiple of the unlabelled images of all ranks in a step. 256 such batches in the paper.
        temperature: t of all similarities.
        alpha: How far labels travel in the propagation, in [0, 1).
        neighbours: Labelled neighbours in each graph, at most as many as there are labelled images.
        threshold: tau, on the prediction before propagation.
        distribution_alignment: Align predictions.
        alignment_momentum: Momentum of the running distribution.
        node_node_weight: lambda_nn.
        edge_edge_weight: lambda_ee; 10 with 1 % of ImageNet's labels, 5 with 10 %.
        node_edge_weight: lambda_ne; 10 with 1 % of ImageNet's labels, 5 with 10 %.
        ema_decay: Decay of the second network; at 0.996 or below it rises to 1 along half a cosine.
        eman: The second network uses averaged batch statistics, and evaluates; else it has the statistics of its own batches, which are
            shuffled over the ranks.
        learning_rate: Full one.
        momentum: Nesterov momentum of SGD.
        weight_decay: SGD's weight decay, of all parameters, unless ``no_decay_norms``.
        no_decay_norms: Not of parameters with one dimension.
        schedule: See ``FixMatch``.
        warmup_epochs: Epochs of linear rise.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *SemiSupervised.panels,
        Curve(
            "Consistencies",
            ("semi/nn_loss", "semi/ee_loss", "semi/ne_loss"),
            note="Node-edge is too large until the queue has been filled.",
        ),
        Curve("Accuracy of propagated labels", ("semi/propagated_accuracy",), note="Needs the true labels, for diagnosis only."),
        Curve("Share of the queue that is filled", ("semi/bank_fill",)),
        Curve("Entropy of the running distribution", ("semi/alignment_entropy",)),
        Curve("Norm of features, weak against strong", ("semi/norm_gap",), note="0: equally long."),
    )

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        num_classes: int,
        num_labelled: int,
        embedding_dim: int = 128,
        norm_features: bool = True,
        bank_size: int = 81_920,
        temperature: float = 0.1,
        alpha: float = 0.1,
        neighbours: int = 128,
        threshold: float = 0.7,
        distribution_alignment: bool = True,
        alignment_momentum: float = 0.9,
        node_node_weight: float = 10.0,
        edge_edge_weight: float = 5.0,
        node_edge_weight: float = 5.0,
        ema_decay: float = 0.999,
        eman: bool = False,
        learning_rate: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        no_decay_norms: bool = False,
        schedule: Schedule = "epoch_cosine",
        warmup_epochs: int = 5,
    ) -> None:
        super().__init__(backbone, feature_dim, num_classes, learning_rate, momentum, weight_decay, no_decay_norms, schedule, warmup_epochs)
        checks.share(ema_decay=ema_decay)
        checks.at_least(1, num_labelled=num_labelled, embedding_dim=embedding_dim, bank_size=bank_size)
        checks.share(threshold=threshold, alignment_momentum=alignment_momentum)
        checks.at_least(0, node_node_weight=node_node_weight, edge_edge_weight=edge_edge_weight, node_edge_weight=node_edge_weight)
        self.save_hyperparameters(ignore=["backbone"])
        self.norm = nn.LayerNorm(feature_dim) if norm_features else nn.Identity()
        self.projector = nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, embedding_dim))
        self.teacher = copy.deepcopy(self._student()).requires_grad_(False)
        self.graph = GraphConsistency(
            num_labelled, bank_size, num_classes, embedding_dim, temperature, alpha, neighbours, threshold, distribution_alignment,
            alignment_momentum,
        )  # fmt: skip
        self.weights = (node_node_weight, edge_edge_weight, node_edge_weight)
        self._pending: tuple[Any, ...] | None = None

    def _student(self) -> nn.ModuleDict:
        parts = ("backbone", "norm", "head", "projector")
        return nn.ModuleDict({name: getattr(self, name) for name in parts})

    def setup(self, stage: str) -> None:
        """Take the classes of the labelled images over from the datamodule.

        Raises:
            ValueError: It doesn't say them, or has another number of labelled images.
        """
        if stage != "fit":
            return
        classes = getattr(getattr(self.trainer, "datamodule", None), "labelled_classes", None)
        if classes is None:
            raise ValueError(
                "SimMatchV2 keeps an embedding of every labelled image and needs a datamodule with labelled_classes, an int64 tensor of "
                "their classes: use SemiSupervisedDataModule, or give yours this attribute in setup()"
            )
        if len(classes) != len(self.graph.label_bank):
            raise ValueError(f"num_labelled={len(self.graph.label_bank)}, but the data have {len(classes)} labelled images: set it to that")
        self.graph.label_bank_class.copy_(classes)

    def train(self, mode: bool = True) -> "SimMatchV2":
        """The averaged network trains along (batch statistics), but with ``eman``."""
        super().train(mode)
        self.teacher.train(mode and not self.hparams["eman"])
        return self

    def features(self, images: Tensor) -> Tensor:
        """Behind the layer norm."""
        return self.norm(super().features(images))

    @torch.no_grad()
    def _averaged(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, unit embeddings and norms of the features, by the averaged network."""
        shuffled = self.teacher.training and world_size() > 1
        order = back = torch.empty(0)
        if shuffled:  # a rank's batch statistics would tell which images stand together
            images = gather_rows(images, with_grad=False)
            place = f"shuffle {self.trainer.global_step} {self.trainer.fit_loop.batch_idx}"
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(own_seed(place, 0))).to(images.device)
            back = order.argsort()
            images = images[order.chunk(world_size())[rank()]]
        raw = self.teacher["backbone"](images)
        normed = self.teacher["norm"](raw)
        logits, z = self.teacher["head"](normed).float(), F.normalize(self.teacher["projector"](normed).float(), dim=1)
        outputs = [logits, z, raw.float().norm(dim=1)]
        if shuffled:
            size = len(back) // world_size()
            outputs = [gather_rows(one)[back][rank() * size : (rank() + 1) * size] for one in outputs]
        return outputs[0], outputs[1], outputs[2]

    def losses(self, batch: SemiBatch) -> dict[str, Tensor]:
        """Labelled loss plus the three weighted consistencies."""
        labelled = len(batch.image)
        logits, z, norms = self._averaged(torch.cat([batch.image, batch.weak]))
        first = super().features(torch.cat([batch.image, batch.strong[0]]))
        raw = [first, *map(super().features, batch.strong[1:])]
        features = [self.norm(one) for one in raw]
        predicted = [self.head(one) for one in features]
        embedded = [F.normalize(self.projector(one).float(), dim=1) for one in features]
        with torch.autocast(logits.device.type, enabled=False):
            supervised = F.cross_entropy(predicted[0][:labelled].float(), batch.label)
            strong_logits = torch.stack([predicted[0][labelled:], *predicted[1:]]).float()
            strong = torch.stack([embedded[0][labelled:], *embedded[1:]])
            graph = self.graph(logits[labelled:], z[labelled:], strong_logits, strong)
            nn_, ee, ne = self.weights
            total = supervised + nn_ * graph.nn + ee * graph.ee + ne * graph.ne
        self._pending = (batch.index, z[:labelled], z[labelled:], graph)
        logs = self.observe(graph.probability.argmax(dim=1), graph.certain, batch.truth)
        if batch.truth is not None:
            right = graph.certain & (graph.pseudo_label.argmax(dim=1) == batch.truth)
            logs["propagated_accuracy"] = right.sum() / graph.certain.sum()
        marginal = self.graph.marginal / self.graph.marginal.sum()
        logs["alignment_entropy"] = torch.special.entr(marginal).sum()
        logs["bank_fill"] = (self.graph.bank_probability.sum(dim=1) > 0).float().mean()
        logs["norm_gap"] = norms[labelled:].mean() / first[labelled:].detach().float().norm(dim=1).mean() - 1
        parts = {"labelled_loss": supervised, "nn_loss": graph.nn, "ee_loss": graph.ee, "ne_loss": graph.ne}
        return {"loss": total, **parts, **logs}

    def on_after_backward(self) -> None:
        """The banks take the batch in: the backward pass needed the old ones."""
        if self._pending is not None:
            self.graph.store(*self._pending)
            self._pending = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The averaged network follows at once: a checkpoint that a callback saves when the batch ends has it."""
        super().optimizer_step(*args, **kwargs)
        decay = self.hparams["ema_decay"]
        if decay <= 0.996:
            decay = cosine_decay(self.trainer.global_step, training_length(self), decay)
        student = self._student()
        ema_update(list(self.teacher.parameters()), list(student.parameters()), decay)
        if self.hparams["eman"]:
            ema_update(list(self.teacher.buffers()), list(student.buffers()), decay)
