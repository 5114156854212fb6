"""The three axes on which an autoencoder's features are compared with a supervised dictionary: figures out of tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_methods.callbacks.sparse_autoencoders.judge import decoder_directions
from lit_methods.callbacks.sparse_autoencoders.sae_evals import core

Rows = Mapping[str, Tensor]
Figures = dict[str, Tensor]
Target = Literal["activation", "reconstruction"]
CHUNK = 512  # rows that are run at once


# ---- data ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Activations with what is known of them.

    Attributes:
        activations: (N, d) float32.
        ids: Attribute -> (N,) int64 values.
        features: (N, h) of the autoencoder.
        rows: Everything that the subject model may want of a sample, each (N, ...).
    """

    activations: Tensor
    ids: dict[str, Tensor]
    features: Tensor
    rows: Rows


@dataclass
class Reference:
    """What the training part has given: the supervised dictionaries, and the features ranked for each value.

    Attributes:
        mean: Codes by means.
        mse: Codes by least squares.
        order: Attribute -> (U, h) ranking of the features by F1.
    """

    mean: core.SupervisedCodes
    mse: core.SupervisedCodes
    order: dict[str, Tensor]


@dataclass
class Edits:
    """How edits of one attribute went.

    Attributes:
        edited: Name of the edit -> (N, d) activations.
        removed: Name of the edit -> (N,) weight that it removed.
        target: (N, d) counterfactual activations.
        keep: (N,) index of the clean samples.
    """

    edited: dict[str, Tensor]
    removed: dict[str, Tensor]
    target: Tensor
    keep: Tensor


@torch.no_grad()
def linear_decoder(autoencoder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (h, d) and bias (d,) in the units of the activations, so that x_hat = features @ directions + bias.

    Where the autoencoder has divided its inputs by an ``input_scale``, both are multiplied by it. Then the effect of a feature on an
    activation is its value times its direction.

    Args:
        autoencoder: With ``encode``, ``decode`` and ``decoder_directions``; without a ``decoder_bias`` it is 0.
        x: (B, d) activations to try it with.

    Raises:
        ValueError: Its reconstruction is something else, or shapes don't fit.
    """
    features = autoencoder.encode(x).float()
    directions = decoder_directions(autoencoder).float()
    bias = getattr(autoencoder, "decoder_bias", x.new_zeros(x.shape[1])).detach().float()
    if directions.ndim != 2 or features.shape[1:] != directions.shape[:1] or not x.shape[1:] == bias.shape == directions.shape[1:]:
        shapes = f"features are {tuple(features.shape)}, decoder_directions {tuple(directions.shape)}, decoder_bias {tuple(bias.shape)}"
        raise ValueError(f"activations are {tuple(x.shape)}, {shapes}: expected (B, d), (B, h), (h, d) and (d,)")
    scale = getattr(autoencoder, "input_scale", 1.0)
    directions, bias = directions * scale, bias * scale
    reconstruct = getattr(autoencoder, "reconstruct", None)
    found = (autoencoder.decode(autoencoder.encode(x)) if reconstruct is None else reconstruct(x)).float()
    expected = features @ directions + bias
    gap = float((found - expected).norm() / found.norm().clamp(min=torch.finfo(found.dtype).tiny))
    if gap > 1e-2:
        raise ValueError(
            f"its reconstruction differs from encode(x) @ decoder_directions + decoder_bias by {gap:.2g} of its length: features have no "
            "fixed direction in the activations, as where each sample is normalised by itself; normalise the data instead"
        )
    return directions, bias


# ---- the subject model -----------------------------------------------------------------------------------------------------------------


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


class Subject:
    """What a model makes of activations at its site, chunk by chunk.

    Args:
        model: ``model(activations (B, d), rows)`` -> (B, C) logits, or a dict of such by attribute, where each attribute has its own. The
            rows are those of the batch.
        sample: Whose prompts are run.

    Attributes:
        pairs: Head -> (N, 2) columns of the two logits whose difference is measured: the batch's ``answer`` and ``foil``, or, without
            them, the prediction on the clean activation and the one after it.
        clean: Head -> (N,) logit difference of the activations as they are.
    """

    def __init__(self, model: Callable[[Tensor, Rows], Any], sample: Sample) -> None:
        self.model, self.rows, self.activations = model, sample.rows, sample.activations
        found: dict[str, list[Tensor]] = {}
        for part in _chunks(len(sample.activations)):
            for head, logits in self._logits(sample.activations[part], part).items():
                columns = torch.stack([self.rows["answer"][part], self.rows["foil"][part]], 1) if self._asked else logits.topk(2, 1).indices
                found.setdefault(head, []).append(columns)
        self.pairs = {head: torch.cat(columns) for head, columns in found.items()}
        self.clean = self.differences(sample.activations)

    @property
    def _asked(self) -> bool:
        return "answer" in self.rows and "foil" in self.rows

    def _logits(self, activations: Tensor, index: slice | Tensor) -> dict[str, Tensor]:
        logits = self.model(activations, {name: value[index] for name, value in self.rows.items()})
        return {name: value.float() for name, value in (logits if isinstance(logits, Mapping) else {"": logits}).items()}

    def _difference(self, logits: Tensor, columns: Tensor) -> Tensor:
        answer, foil = logits.gather(1, columns).unbind(1)
        return answer - foil

    def differences(self, activations: Tensor) -> dict[str, Tensor]:
        """Head -> (N,) logit differences with other activations (N, d) at the site.

        Args:
            activations: (N, d).
        """
        found: dict[str, list[Tensor]] = {}
        for part in _chunks(len(activations)):
            for head, logits in self._logits(activations[part], part).items():
                found.setdefault(head, []).append(self._difference(logits, self.pairs[head][part]))
        return {head: torch.cat(parts) for head, parts in found.items()}

    def predictions(self, activations: Tensor, keep: Tensor, attribute: str) -> Tensor:
        """(M,) predictions in an attribute's logits, with other activations at the site.

        Args:
            activations: (M, d).
            keep: (M,) index of the samples.
            attribute: Whose logits, where attributes have their own.
        """
        found = []
        for part in _chunks(len(activations)):
            logits = self._logits(activations[part], keep[part])
            found.append(logits.get(attribute, next(iter(logits.values()))).argmax(1))
        return torch.cat(found)

    def gradients(self, activations: Tensor, keep: Tensor, attribute: str) -> Tensor:
        """(M, d) gradient of the logit difference, see :meth:`predictions`."""
        found = []
        for part in _chunks(len(activations)):
            with torch.inference_mode(False), torch.enable_grad():
                at = activations[part].clone().requires_grad_()
                logits = self._logits(at, keep[part].clone())
                head = attribute if attribute in logits else next(iter(logits))
                difference = self._difference(logits[head], self.pairs[head][keep[part]].clone())
                found.append(torch.autograd.grad(difference.sum(), at)[0])
        return torch.cat(found)


# ---- the axes --------------------------------------------------------------------------------------------------------------------------


def approximation(sample: Sample, reference: Reference, reconstruction: Tensor, subject: Subject | None) -> Figures:
    """Squared error as a share of the variance, and, with a subject model, sufficiency and necessity, of features and codes.

    Where attributes have logits of their own, sufficiency and necessity are means over them.

    Args:
        sample: What is measured on.
        reference: Codes of the training part.
        reconstruction: (N, d) by the autoencoder.
        subject: None: errors alone.
    """
    ids = list(sample.ids.values())
    x, centre = sample.activations, reference.mean.bias
    sources = {
        "sae": reconstruction,
        "mean_codes": core.reconstruct_by_codes(reference.mean, ids),
        "mse_codes": core.reconstruct_by_codes(reference.mse, ids),
    }
    variance = (x - centre).square().sum()
    figures = {f"error/{name}": (x - found).square().sum() / variance for name, found in sources.items()}
    if subject is None:
        return figures
    ablated = subject.differences(centre.expand_as(x))
    for name, found in sources.items():
        replaced, removed = subject.differences(found), subject.differences(centre + x - found)
        means = [(clean.mean(), ablated[head].mean(), replaced[head].mean(), removed[head].mean()) for head, clean in subject.clean.items()]
        figures[f"sufficiency/{name}"] = torch.stack([core.sufficiency(kept, clean, none) for clean, none, kept, _ in means]).mean()
        figures[f"necessity/{name}"] = torch.stack([core.necessity(left, clean, none) for clean, none, _, left in means]).mean()
    return figures


def edits(
    sample: Sample,
    reference: Reference,
    directions: Tensor,
    attribute: str,
    matched: Sequence[Tensor],
    k_edits: Sequence[int],
    target: Target = "activation",
) -> Edits:
    """Clean activations turned into counterfactual ones, by the supervised codes and by k features.

    Args:
        sample: Clean and counterfactual samples are among these.
        reference: Codes and rankings of the training part.
        directions: (h, d) decoder directions.
        attribute: The one that changes.
        matched: (N,) integers that pairs have in common, beside the other attributes.
        k_edits: Numbers of features.
        target: What the greedy edit goes for.
    """
    place = list(sample.ids).index(attribute)
    others = [one for name, one in sample.ids.items() if name != attribute] + list(matched)
    values = sample.ids[attribute]
    partner = core.matched_pairs(values, torch.stack(others, 1) if others else values.new_zeros(len(values), 0))
    keep = (partner >= 0).nonzero()[:, 0]
    partner = partner[keep]
    x, goal, clean, other = sample.activations[keep], sample.activations[partner], sample.features[keep], sample.features[partner]
    code, old, new = reference.mean.codes[place], values[keep], values[partner]
    weight = core.code_weights(reference.mean, [one[keep] for one in sample.ids.values()])[:, place]
    edited = {"none": x, "supervised": core.edit_arithmetic(x, code, old, new), "subspace": core.edit_subspace(x, code, old, new)}
    removed = {"none": torch.zeros_like(weight), "supervised": weight, "subspace": weight}
    delta = goal - x if target == "activation" else (other - clean) @ directions
    weights = core.feature_weights(clean, directions)
    for k in k_edits:
        greedy = core.greedy_edit(x, clean, other, directions, delta, k)
        guided = core.guided_edit(x, clean, other, directions, reference.order[attribute], old, new, k)
        for name, edit, features in ((f"greedy_{k}", greedy.edited, greedy.features), (f"guided_{k}", guided.edited, guided.removed)):
            edited[name], removed[name] = edit, core.removed_weight(weights, features)
    return Edits(edited, removed, goal, keep)


def control(attribute: str, made: Edits, subject: Subject | None) -> Figures:
    """Distance to the counterfactual and weight removed; with a subject model also agreement with the full patch.

    Args:
        attribute: The one that was changed.
        made: What :func:`edits` gives; of one sample or more.
        subject: None: distances alone.
    """
    figures: Figures = {}
    wanted = gradient = None
    if subject is not None:
        wanted = subject.predictions(made.target, made.keep, attribute)
        gradient = subject.gradients(made.target, made.keep, attribute)
    for name, edited in made.edited.items():
        figures[f"distance/{attribute}/{name}"] = core.l2_distance(made.target, edited)
        figures[f"weight/{attribute}/{name}"] = made.removed[name].nanmean()
        if subject is not None and wanted is not None and gradient is not None:
            figures[f"agreement/{attribute}/{name}"] = subject.predictions(edited, made.keep, attribute).eq(wanted).float().mean()
            figures[f"attribution/{attribute}/{name}"] = core.attribution_distance(made.target, edited, gradient)
    return figures


@dataclass
class Explained:
    """How well each feature tells the values of one attribute.

    Attributes:
        best: (h,) F1 of its best value, -inf for a feature that is never active.
        value: (h,) that value.
        union: (h,) F1 of its best union of values.
        union_size: (h,) how many values that union has.
        scores: (h, U) of all values.
    """

    best: Tensor
    value: Tensor
    union: Tensor
    union_size: Tensor
    scores: core.ActivityScores


def explained(counts: core.ActivityCounts, group_size: int) -> Explained:
    """The explanation of each feature by one value, and by a union of values; the union of all values explains nothing and is left out.

    Args:
        counts: Of one attribute.
        group_size: Most values in a union.
    """
    scores = core.f1_scores(counts)
    best, value = core.best_values(scores.f1)
    unions = core.union_f1(counts, core.value_order(scores.f1, max(1, min(group_size, scores.f1.shape[1] - 1))))
    union, size = unions.nan_to_num(nan=-torch.inf).max(1)
    return Explained(best, value, union, size + 1, scores)


def interpretability(attribute: str, found: Explained, threshold: float) -> Figures:
    """Number of features that tell a value, or a union of values, and the F1 of the best feature of each value.

    Args:
        attribute: The one that features tell.
        found: What :func:`explained` gives.
        threshold: F1 above which a feature counts.
    """
    by_value = found.scores.f1.nan_to_num(nan=0.0).amax(0)
    return {
        f"features/{attribute}": (found.best > threshold).sum().float(),
        f"union_features/{attribute}": (found.union > threshold).sum().float(),
        f"best_f1/{attribute}": by_value.mean(),
    }


def causal_check(
    attribute: str, sample: Sample, told: Tensor, directions: Tensor, bias: Tensor, centre: Tensor, subject: Subject
) -> Figures:
    """Share of the logit difference that is left with an attribute's features alone, and without them.

    Args:
        attribute: The one that the features tell.
        sample: What is measured on.
        told: (h,) bool: the features that tell it.
        directions: (h, d).
        bias: (d,) of the decoder.
        centre: (d,) mean activation.
        subject: The model.
    """
    own = (sample.features * told) @ directions
    ablated = subject.differences(centre.expand_as(sample.activations))
    kept, removed = subject.differences(own + bias), subject.differences(sample.activations - own)
    head = attribute if attribute in subject.clean else next(iter(subject.clean))
    clean, none = subject.clean[head].mean(), ablated[head].mean()
    return {
        f"kept/{attribute}": core.sufficiency(kept[head].mean(), clean, none),
        f"removed/{attribute}": core.sufficiency(removed[head].mean(), clean, none),
    }
