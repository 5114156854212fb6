"""top-AFA: a sparse autoencoder whose code has the norm of its input (arXiv:2503.24277); the maths stand in ``core.py``."""

from lit_methods import checks
from lit_methods.arguments import handed_on
from lit_methods.catalog import Technique
from lit_methods.sparse_autoencoders.dictionary import EncoderStart, Normalization
from lit_methods.sparse_autoencoders.module import SparseAutoencoder

TECHNIQUE = Technique(
    slug="top_afa",
    short="top-AFA",
    title="Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality",
    arxiv="2503.24277",
    family="sparse_autoencoders",
    form="module",
    classes=("lit_methods.TopAFA", "lit_methods.SparseAutoencoder", "lit_methods.callbacks.AFAEvaluation"),
    configs=("top_afa.yaml", "topk.yaml"),
    golden=("topafa_step", "topk_step", "batchtopk_step", "zf_metrics"),
    claim=(
        "On sparse mixtures, top-AFA, which is given no k, reconstructs with a smaller normalised error than TopK with k = 24, the best of "
        "k = 2, 6 and 24."
    ),
    summary="A sparse autoencoder that gives each sample as many features as bring the code's norm to the input's; evaluates others by it.",
)


class TopAFA(SparseAutoencoder):
    """A sparse autoencoder without a k: a sample gets the features that bring the norm of its code nearest to its own norm.

    The loss has afa_coeff x mean (|z| - |x|)^2 in place of a penalty on the code's size. How many features that gives is far above the
    number of a sample's true causes, and hardly correlated with it. ``afa_coeff`` is sensitive: it does need tuning.

    Runs: as :class:`SparseAutoencoder` with ``activation: topafa`` and ``penalties: {afa: afa_coeff}``. Norms and sums are in float32 or
    wider. Codes are dense, as h / 10 features of a sample or more are active.

    Saves: as :class:`SparseAutoencoder`.

    Refuses: batches of another width.

    Args:
        width: Size d of an activation.
        features: Size h of the dictionary.
        afa_coeff: Factor of the loss of the norms, >= 0; the paper tries 1/128 to 1/16.
        l1_coeff: Factor of the mean sum of magnitudes, >= 0.
        encoder_start: ``kaiming``: the encoder begins with rows of norms about sqrt(2 width / features), as in the authors' code;
            ``decoder``: with the decoder's rows, of norm 1.
        normalize: ``none``; ``sample``: each sample with mean 0 and standard deviation 1, as in the paper; ``norm_1``, ``norm_sqrt``: all
            divided by one number, so that their mean norm is 1, or sqrt(width).
        aux_coeff: Factor of the loss of dead features, >= 0; 0: without.
        aux_features: Dead features that each sample takes for it, >= 1.
        dead_after: Training batches in a row without activity that make a feature dead, >= 1.
        learning_rate: Adam's.
        betas: Adam's two decay rates.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        width: int,
        features: int,
        afa_coeff: float = 1 / 32,
        l1_coeff: float = 0.0,
        encoder_start: EncoderStart = "kaiming",
        normalize: Normalization = "sample",
        aux_coeff: float = 1 / 32,
        aux_features: int = 512,
        dead_after: int = 5,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        checks.at_least(0, afa_coeff=afa_coeff, l1_coeff=l1_coeff)
        penalties = {"afa": afa_coeff, **({"l1": l1_coeff} if l1_coeff else {})}
        super().__init__(**handed_on(SparseAutoencoder, locals(), activation="topafa", penalties=penalties))
