"""MultVAE (Liang et al., arXiv:1802.05814): a variational autoencoder with a multinomial likelihood over items."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.tasks.recommendation.base import Recommender


def multinomial_loss(logits: Tensor, history: Tensor) -> Tensor:
    """Negative multinomial log-likelihood: -mean over users of sum over items of x log softmax(logits).

    Args:
        logits: (B, I) floating point.
        history: (B, I) non-negative counts or ones x.

    Returns:
        Scalar.
    """
    return -(F.log_softmax(logits, dim=1) * history).sum(dim=1).mean()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(mean, exp(log_variance)) to N(0, 1): summed over dimensions, mean over users.

    Args:
        mean: (B, Z).
        log_variance: (B, Z).

    Returns:
        Scalar >= 0.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()


def annealed_beta(step: int, cap: float, steps: int) -> float:
    """Factor of the KL term after ``step`` optimiser steps: linear from 0 to ``cap`` over ``steps``; 0 steps: ``cap`` at once."""
    return cap * min(1.0, step / steps) if steps > 0 else cap


class MultVAE(Recommender):
    """MultVAE on implicit feedback; recommends to users that it wasn't trained on, from their history.

    Runs: training batches have ``history`` (B, I) float32; evaluation ``history``, the known part of held-out users, ``known`` and
    ``target`` (B, I) bool. The noise and the dropout come from torch's global generator, which the ``ExactResume`` callback keeps in the
    checkpoint. The divergence and its weight are logged as ``recommender/kl`` and ``recommender/beta``.

    Saves: encoder and decoder.

    Refuses: what :class:`Recommender` refuses.

    Args:
        num_items: I, as in the data.
        hidden_dim: Width of the hidden layer of encoder and decoder.
        latent_dim: Z.
        dropout: Dropout of the normalised history.
        beta: Factor of the KL term when annealing is over.
        anneal_steps: Optimiser steps of linear annealing from 0.
        learning_rate: Adam's learning rate at the start.
        min_lr: Where the cosine of the learning rate ends; None: no schedule.
        top_k: Lengths of the list of recommendations.
    """

    def __init__(
        self,
        num_items: int,
        hidden_dim: int = 600,
        latent_dim: int = 200,
        dropout: float = 0.5,
        beta: float = 0.2,
        anneal_steps: int = 200_000,
        learning_rate: float = 1e-3,
        min_lr: float | None = None,
        top_k: Sequence[int] = (20, 50),
    ) -> None:
        super().__init__(top_k, learning_rate, min_lr)
        checks.at_least(1, num_items=num_items, hidden_dim=hidden_dim, latent_dim=latent_dim)
        checks.at_least(0, beta=beta, anneal_steps=anneal_steps)
        checks.within("[0, 1)", dropout=dropout)
        self.save_hyperparameters()
        self.num_items, self.dropout, self.beta, self.anneal_steps = num_items, dropout, beta, anneal_steps
        self.encoder = nn.Sequential(nn.Linear(num_items, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, num_items))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.trunc_normal_(layer.bias, std=1e-3)

    def setup(self, stage: str) -> None:
        """Compare sizes with the data's."""
        self.checked_size(None, self.num_items)

    def encode(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """(B, I) history -> (B, Z) mean and (B, Z) log variance."""
        normal = F.dropout(F.normalize(history, dim=1), self.dropout, self.training)
        mean, log_variance = self.encoder(normal).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, history: Tensor) -> Tensor:
        """(B, I) history -> (B, I) logits, from the mean of the code."""
        return self.decoder(self.encode(history)[0])

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, I) logits."""
        return self(batch["history"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Reconstruct the histories."""
        history = batch["history"]
        mean, log_variance = self.encode(history)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        kl = gaussian_kl(mean, log_variance)
        beta = annealed_beta(self.global_step, self.beta, self.anneal_steps)
        loss = multinomial_loss(self.decoder(code), history) + beta * kl
        self.log("recommender/loss", loss.detach(), prog_bar=True, batch_size=len(history))
        self.log_dict({"recommender/kl": kl.detach(), "recommender/beta": beta}, batch_size=len(history))
        return loss


__all__ = ["MultVAE", "annealed_beta", "gaussian_kl", "multinomial_loss"]
