"""AbsTopK: a sparse autoencoder whose features have two signs (arXiv:2510.00404); the operator stands with the family's others."""

from typing import ClassVar

from torch import Tensor

from lit_methods.arguments import handed_on
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Panel
from lit_methods.sparse_autoencoders.dictionary import Code, LossScale, Normalization
from lit_methods.sparse_autoencoders.module import SparseAutoencoder

TECHNIQUE = Technique(
    slug="abstopk",
    title="AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features",
    arxiv="2510.00404",
    family="sparse_autoencoders",
    form="module",
    classes=("lit_methods.AbsTopK", "lit_methods.callbacks.SteeringProbe", "lit_methods.callbacks.BidirectionalityMonitor"),
    configs=("abstopk.yaml",),
    golden=("prox", "sae_step", "abstopk_training_step", "jumprelu_step", "dim_steering"),
    claim="On sums of signed axes, AbsTopK with as many features as axes has a lower normalised error than TopK with the same size and the "
    "same k.",
    summary="A sparse autoencoder that keeps the k pre-activations of largest magnitude with their signs: one feature codes both poles.",
)


class AbsTopK(SparseAutoencoder):
    """A sparse autoencoder that keeps, of each sample, the k pre-activations of largest magnitude, with their signs.

    TopK without its ReLU: where a concept has two poles, one feature codes both, and TopK takes two features with opposite directions.

    Runs: as :class:`SparseAutoencoder` with ``activation: abstopk``. L0, dead features and the loss that revives them go by |z|; positive
    and negative entries of a sample are logged apart.

    Saves: as :class:`SparseAutoencoder`.

    Refuses: k above ``features``; batches of another width.

    Args:
        width: Size d of an activation.
        features: Size h of the dictionary.
        k: Entries kept of a sample; the paper takes about a tenth of ``width``.
        per_batch: Keep k B entries of each rank's batch, however many of each sample, as in the first author's code; the paper keeps k of
            each sample.
        encoder_bias: The encoder has a bias of its own, W x + b_e, as in the paper; False: W (x - b) with the decoder's bias b, as in the
            code.
        normalize: ``none``; ``sample``: each sample with mean 0 and standard deviation 1, as in the first author's code; ``norm_1``,
            ``norm_sqrt``: all divided by one number, so that their mean norm is 1, or sqrt(width).
        loss: Squared error, mean over the batch: ``mean`` over the width too, as in the code, ``sum`` over it, or ``half_sum``, as in the
            paper.
        aux_coeff: Factor of the loss of dead features, >= 0; 0: without.
        aux_features: Dead features that each sample takes for it, >= 1.
        dead_after: Training batches in a row without activity that make a feature dead, >= 1.
        learning_rate: Adam's.
        betas: Adam's two decay rates.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *(panel for panel in SparseAutoencoder.panels if panel.title != "Penalties"),  # it has none
        Curve("Active features of a sample, by sign", ("sae/positive", "sae/negative"), note="Training. TopK has none of the second."),
    )

    def __init__(
        self,
        width: int,
        features: int,
        k: int,
        per_batch: bool = False,
        encoder_bias: bool = False,
        normalize: Normalization = "sample",
        loss: LossScale = "mean",
        aux_coeff: float = 1 / 32,
        aux_features: int = 512,
        dead_after: int = 5,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        own = {"activation": "abstopk", "settings": {"k": k, "per_batch": per_batch}}
        bias = {"encoder_bias": "learned" if encoder_bias else "none", "centre": not encoder_bias}
        super().__init__(**handed_on(SparseAutoencoder, locals(), **own, **bias))
        self.save_hyperparameters("k", "per_batch", "encoder_bias")

    @staticmethod
    def sizes(code: Code) -> dict[str, Tensor]:
        """Mean numbers of entries of a sample, of positive ones, and of negative ones; and mean sum of magnitudes."""
        values, batch = (code, len(code)) if isinstance(code, Tensor) else (code.values, code.shape[0])
        signs = {"positive": (values > 0).sum() / batch, "negative": (values < 0).sum() / batch}
        return SparseAutoencoder.sizes(code) | signs
