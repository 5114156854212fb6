"""NeuMF (He et al., arXiv:1708.05031): a product of embeddings beside a small network on their concatenation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.tasks.recommendation.base import Recommender


def neumf_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy on a positive item plus that on negative ones: the sum of two means, so that both weigh the same.

    Args:
        positive: (B,) logits of items that the users have taken.
        negative: (B, N) logits of items that they haven't.

    Returns:
        Scalar >= 0.
    """
    return F.softplus(-positive).mean() + F.softplus(negative).mean()


class NeuMF(Recommender):
    """NeuMF on implicit feedback, ranked among candidates.

    Runs: training batches have ``user`` and ``positive`` (B,), ``negative`` (B, N) int64; evaluation ``user`` (B,), ``item`` (B, C) int64
    candidates, ``known`` and ``target`` (B, C) bool.

    Saves: the tables ``gmf_user`` and ``gmf_item`` of the product, ``mlp_user`` and ``mlp_item`` of the network, which are the ones that
    DSL masks, and the layers.

    Refuses: what :class:`Recommender` refuses.

    Args:
        num_users: U, as in the data.
        num_items: I, as in the data.
        embedding_dim: Width of each of the four tables.
        hidden: Widths of the network's layers.
        dropout: Before each layer of the network.
        learning_rate: Adam's learning rate at the start.
        min_lr: Where the cosine of the learning rate ends; None: no schedule.
        top_k: Lengths of the list of recommendations.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        embedding_dim: int = 16,
        hidden: Sequence[int] = (32, 16, 8),
        dropout: float = 0.2,
        learning_rate: float = 1e-4,
        min_lr: float | None = None,
        top_k: Sequence[int] = (20,),
    ) -> None:
        super().__init__(top_k, learning_rate, min_lr)
        checks.at_least(1, num_users=num_users, num_items=num_items, embedding_dim=embedding_dim)
        checks.within("[0, 1)", dropout=dropout)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden is {list(hidden)}: give one width or more, each at least 1")
        self.save_hyperparameters()
        self.num_users, self.num_items = num_users, num_items
        self.gmf_user, self.mlp_user = nn.Embedding(num_users, embedding_dim), nn.Embedding(num_users, embedding_dim)
        self.gmf_item, self.mlp_item = nn.Embedding(num_items, embedding_dim), nn.Embedding(num_items, embedding_dim)
        layers: list[nn.Module] = []
        for width_in, width_out in zip((2 * embedding_dim, *hidden[:-1]), hidden, strict=True):
            layers += [nn.Dropout(dropout), nn.Linear(width_in, width_out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)
        self.head = nn.Linear(embedding_dim + hidden[-1], 1)
        for table in (self.gmf_user, self.gmf_item, self.mlp_user, self.mlp_item):
            nn.init.normal_(table.weight, std=0.01)

    def setup(self, stage: str) -> None:
        """Compare sizes with the data's."""
        self.checked_size(self.num_users, self.num_items)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """(...,) int64 users and items -> (...,) logits."""
        product = self.gmf_user(user) * self.gmf_item(item)
        joint = self.mlp(torch.cat([self.mlp_user(user), self.mlp_item(item)], dim=-1))
        return self.head(torch.cat([product, joint], dim=-1)).squeeze(-1)

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, C) logits of the candidates."""
        return self(batch["user"][:, None].expand_as(batch["item"]), batch["item"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Positive and negatives in one pass."""
        items = torch.cat([batch["positive"][:, None], batch["negative"]], dim=1)
        logits = self(batch["user"][:, None].expand_as(items), items)
        loss = neumf_loss(logits[:, 0], logits[:, 1:])
        self.log("recommender/loss", loss.detach(), prog_bar=True, batch_size=len(items))
        return loss


__all__ = ["NeuMF", "neumf_loss"]
