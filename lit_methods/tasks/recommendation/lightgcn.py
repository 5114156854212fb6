"""LightGCN (He et al., arXiv:2002.02126): an embedding table smoothed over the graph of users and items, trained by BPR.

Golden vectors: the equations of the paper as shuyao-wang/DSL@a93cc5d (LightGCN/model.py) has them, evaluated in float64. Left out: its
dropout of nodes and edges.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.tasks.recommendation.base import Recommender


def normalized_adjacency(user: Tensor, item: Tensor, num_users: int, num_items: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A^ = D^-1/2 A D^-1/2 of the bipartite graph, users first. A node without edges has an empty row.

    Args:
        user: (E,) int64 in 0..num_users-1.
        item: (E,) int64 in 0..num_items-1; no pair twice.
        num_users: U.
        num_items: I.
        dtype: Dtype of the result.

    Returns:
        (U + I, U + I) sparse, coalesced, symmetric, without gradient.

    Raises:
        ValueError: Shapes that differ, or an index out of range.
    """
    if user.shape != item.shape or user.ndim != 1:
        raise ValueError(f"user and item must be (edges,) both, got {tuple(user.shape)} and {tuple(item.shape)}")
    for name, index, size in (("user", user, num_users), ("item", item, num_items)):
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < size):
            raise ValueError(f"{name} runs from {int(index.min())} to {int(index.max())}, expected 0 to {size - 1}: count from 0")
    size = num_users + num_items
    row, column = torch.cat([user, item + num_users]), torch.cat([item + num_users, user])
    scale = torch.bincount(row, minlength=size).clamp(min=1).to(dtype).rsqrt()
    values = scale[row] * scale[column]
    return torch.sparse_coo_tensor(torch.stack([row, column]), values, (size, size), check_invariants=False).coalesce()


def propagate(adjacency: Tensor, embedding: Tensor, num_layers: int) -> Tensor:
    """Z = mean of E, A^ E, ..., A^^L E: equations 7 and 8 of LightGCN with equal weights.

    Args:
        adjacency: (N, N) sparse, as from :func:`normalized_adjacency`, in the dtype of ``embedding``.
        embedding: (N, D) floating point.
        num_layers: L >= 0.

    Returns:
        (N, D).
    """
    with torch.autocast(embedding.device.type, enabled=False):
        total = layer = embedding
        for _ in range(num_layers):
            layer = torch.sparse.mm(adjacency, layer)
            total = total + layer
        return total / (num_layers + 1)


def lightgcn_loss(
    embedding: Tensor,
    final: Tensor,
    user: Tensor,
    positive: Tensor,
    negative: Tensor,
    num_users: int,
    reg_weight: float,
) -> dict[str, Tensor]:
    """BPR loss on the smoothed embeddings, and a penalty on those of the table.

    Args:
        embedding: (U + I, D), E, users first.
        final: (U + I, D), Z = ``propagate(adjacency, embedding, num_layers)``.
        user: (B,) int64.
        positive: (B,) int64 item of each user, counted from 0.
        negative: (B,) int64 item that the user doesn't have.
        num_users: U.
        reg_weight: Factor of the penalty, >= 0.

    Returns:
        Scalars ``bpr`` = mean softplus(z_u . z_j - z_u . z_i), ``reg`` = reg_weight / 2 * sum(|e_u|^2 + |e_i|^2 + |e_j|^2) / B, and
        ``total``, their sum.
    """
    rows = user, positive + num_users, negative + num_users
    z_user, z_positive, z_negative = (final[row] for row in rows)
    bpr = F.softplus((z_user * z_negative).sum(dim=1) - (z_user * z_positive).sum(dim=1)).mean()
    squares = torch.stack([embedding[row].square().sum() for row in rows]).sum()
    reg = reg_weight / 2 * squares / len(user)
    return {"bpr": bpr, "reg": reg, "total": bpr + reg}


class LightGCN(Recommender):
    """LightGCN on implicit feedback. One table, ``embedding``, holds users and then items.

    Runs: the graph comes from the datamodule (``RatingsDataModule`` with ``mode: bpr``) in ``setup``, or from :meth:`set_graph`. Training
    batches have ``user``, ``positive``, ``negative``, each (B,) int64; evaluation ``user`` (B,) int64, ``known`` and ``target`` (B, I)
    bool. Both parts of the loss are logged as ``recommender/bpr`` and ``recommender/reg``.

    Saves: the table; the graph is made anew.

    Refuses: what :class:`Recommender` refuses; scores before there is a graph.

    Args:
        num_users: U, as in the data.
        num_items: I, as in the data.
        embedding_dim: D.
        num_layers: L.
        reg_weight: Factor of the penalty on the table's rows of the batch.
        learning_rate: Adam's learning rate at the start.
        min_lr: Where the cosine of the learning rate ends; None: no schedule.
        top_k: Lengths of the list of recommendations.

    Raises:
        ValueError: A number outside its range.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        embedding_dim: int = 64,
        num_layers: int = 3,
        reg_weight: float = 1e-4,
        learning_rate: float = 1e-2,
        min_lr: float | None = 1e-4,
        top_k: Sequence[int] = (20,),
    ) -> None:
        super().__init__(top_k, learning_rate, min_lr)
        checks.at_least(1, num_users=num_users, num_items=num_items, embedding_dim=embedding_dim)
        checks.at_least(0, num_layers=num_layers, reg_weight=reg_weight)
        self.save_hyperparameters()
        self.num_users, self.num_items, self.num_layers, self.reg_weight = num_users, num_items, num_layers, reg_weight
        self.embedding = nn.Embedding(num_users + num_items, embedding_dim)
        nn.init.xavier_uniform_(self.embedding.weight)
        self._edges: tuple[Tensor, Tensor] | None = None
        self._adjacency: Tensor | None = None
        self._final: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Take the graph from the datamodule.

        Raises:
            ValueError: The data have other numbers of users or items.
        """
        self.checked_size(self.num_users, self.num_items)
        data = getattr(self.trainer, "datamodule", None)
        edges = getattr(data, "train_interactions", None)
        if edges is not None:
            self.set_graph(*edges)

    def set_graph(self, user: Tensor, item: Tensor) -> None:
        """The interactions to train on, each pair once: (E,) int64 both, counted from 0."""
        self._edges = user, item
        self._adjacency = self._final = None

    def row_popularity(self) -> dict[str, dict[str, tuple[slice, Tensor]]]:
        """How often each row of the table was trained on: parameter name -> kind of row -> (its rows, (rows,) interactions)."""
        if self._edges is None:
            return {}
        users, items = self._edges
        return {
            "embedding.weight": {
                "users": (slice(0, self.num_users), torch.bincount(users, minlength=self.num_users)),
                "items": (slice(self.num_users, None), torch.bincount(items, minlength=self.num_items)),
            }
        }

    def final_embedding(self) -> Tensor:
        """(U + I, D) smoothed embeddings Z."""
        table = self.embedding.weight
        if self._edges is None:
            raise RuntimeError("LightGCN has no graph: train with RatingsDataModule(mode='bpr'), or call set_graph(user, item) first")
        if self._adjacency is None or self._adjacency.device != table.device or self._adjacency.dtype != table.dtype:
            with torch.inference_mode(False), torch.no_grad():  # a first use in validation must not make it unfit for training
                user, item = (index.to(table.device) for index in self._edges)
                self._adjacency = normalized_adjacency(user, item, self.num_users, self.num_items, table.dtype)
        return propagate(self._adjacency, table, self.num_layers)

    def forward(self, user: Tensor) -> Tensor:
        """(B,) users -> (B, I) scores of all items."""
        final = self.final_embedding() if self._final is None else self._final
        return final[user] @ final[self.num_users :].T

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, I) scores; the graph is smoothed once for a whole evaluation."""
        if self._final is None:
            self._final = self.final_embedding()
        return self(batch["user"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """BPR on a batch of triples."""
        triple = batch["user"], batch["positive"], batch["negative"]
        losses = lightgcn_loss(self.embedding.weight, self.final_embedding(), *triple, self.num_users, self.reg_weight)
        size = len(batch["user"])
        self.log("recommender/loss", losses["total"].detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"recommender/{name}": losses[name].detach() for name in ("bpr", "reg")}, batch_size=size)
        return losses["total"]

    def _forget(self) -> None:
        self._final = None  # the weights have changed since, or will

    def on_validation_epoch_start(self) -> None:
        """Smooth anew."""
        self._forget()

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics."""
        super().on_validation_epoch_end()
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Smooth anew."""
        self._forget()

    def on_test_epoch_end(self) -> None:
        """Logs the metrics."""
        super().on_test_epoch_end()
        self._forget()

    def on_predict_epoch_start(self) -> None:
        """Smooth anew."""
        self._forget()

    def on_predict_epoch_end(self) -> None:
        """Forget the smoothed embeddings."""
        self._forget()


__all__ = ["LightGCN", "lightgcn_loss", "normalized_adjacency", "propagate"]
