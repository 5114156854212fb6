"""Loss Recovered: how well a language model reads on with reconstructions in the place of its activations."""

from collections.abc import Callable
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lit_methods import checks, distributed
from lit_methods.callbacks.evaluation.callback import Split
from lit_methods.callbacks.sparse_autoencoders.judge import AutoencoderJudge
from lit_methods.callbacks.twin import evaluating
from lit_methods.datamodules.activations.hooked import Site, call, first_tensor, named_module
from lit_methods.datamodules.activations.splicing import spliced
from lit_methods.panels import Curve, Panel
from lit_methods.steps import log_global
from lit_methods.tasks.language.causal_lm import token_losses


class SplicedLosses(NamedTuple):
    """Sums of the cross-entropies of the tokens, in nats, and their number: float64 scalars, which add up over batches.

    Attributes:
        original: With the model's own activations.
        spliced: With reconstructions in their place.
        zero: With zeros.
        tokens: Tokens that were predicted.
    """

    original: Tensor
    spliced: Tensor
    zero: Tensor
    tokens: Tensor


def loss_recovered(original: Tensor, spliced: Tensor, zero: Tensor) -> Tensor:
    """(H_zero - H_spliced) / (H_zero - H_original): 1 if reconstructions do as well as activations, 0 if no better than zeros.

    Args:
        original: Cross-entropy with the activations.
        spliced: With their reconstructions.
        zero: With zeros.
    """
    return (spliced - zero) / (original - zero)


def _loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies, and number of tokens."""
    output = call(model, batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", first_tensor(output))
    ids = batch.get("input_ids") if isinstance(batch, dict) else first_tensor(batch)
    if not isinstance(logits, Tensor) or ids is None or logits.shape[:2] != ids.shape:
        shapes = [None if one is None else tuple(one.shape) for one in (logits, ids)]
        raise ValueError(f"the language model gives {shapes[0]} for tokens {shapes[1]}: expected logits (B, L, V) for input_ids (B, L)")
    labels = batch.get("labels") if isinstance(batch, dict) else None
    if labels is not None:
        return token_losses(logits, labels)
    following = ids[:, 1:].clone()
    if isinstance(batch, dict) and (mask := batch.get("attention_mask")) is not None:
        following[mask[:, 1:] == 0] = -100
    return token_losses(logits[:, :-1], following)


@torch.no_grad()
def spliced_losses(
    model: nn.Module, batch: Any, hook: str, reconstruct: Callable[[Tensor], Tensor], site: Site = "output", skip_first: int = 0
) -> SplicedLosses:
    """Losses of a batch of text with activations, reconstructions and zeros at one submodule.

    Args:
        model: A causal language model: of ours, of transformers, or any that gives logits (B, L, V) or an output with such.
        batch: Tokens (B, L), or a dict with ``input_ids``; ``labels`` (B, L), the token that follows each, -100 doesn't count. Without
            labels the tokens themselves, one further.
        hook: Name of the submodule, as ``model.named_modules()`` has it.
        reconstruct: (N, d) activations -> (N, d).
        site: ``output`` of the submodule, or its first ``input``.
        skip_first: Tokens at the beginning of each window whose activations stay as they are.

    Raises:
        ValueError: No such submodule; the message has the nearest names. Or it gives something else than (B, L, d).
    """

    def instead(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def replace(x: Tensor) -> Tensor:
            if x.ndim != 3:
                raise ValueError(f"hook={hook!r}: its activations are {tuple(x.shape)}: expected (B, L, d), one vector a token")
            later = x[:, skip_first:]
            new = change(later.flatten(0, 1)).view_as(later).to(x.dtype)
            return torch.cat([x[:, :skip_first], new], 1)

        return replace

    original, tokens = _loss(model, batch)
    with spliced(model, hook, instead(reconstruct), site):
        replaced, _ = _loss(model, batch)
    with spliced(model, hook, instead(torch.zeros_like), site):
        zero, _ = _loss(model, batch)
    return SplicedLosses(original.double(), replaced.double(), zero.double(), tokens.double())


class LossRecovered(AutoencoderJudge):
    """Measures a sparse autoencoder by the language model that its activations come from: (H_zero - H_spliced) / (H_zero - H_original).

    H is the cross-entropy of the model on text: with its own activations (original), with reconstructions spliced in at a submodule, and
    with zeros there. 1: nothing is lost. Below 0: worse than zeros.

    Runs: at the end of validation and test, three forward passes of the language model for each of ``batches`` batches of text, dealt to
    the ranks. The sanity check measures a batch and logs nothing. What is logged are ``loss_recovered/<split>_share`` and the three losses
    in nats per token.
    Saves: nothing.
    Refuses: modules without ``encode`` and the other parts of an autoencoder, a hook that names no submodule (with the nearest names),
    runs without a language model or text.

    Args:
        language_model: A causal language model, such as ``CausalLM``; null: the datamodule's ``model``, as ``HarvestedActivations`` has it.
        text: Datamodule of text, whose validation batches are read; null: the datamodule's ``text``.
        hook: Name of the submodule, such as ``model.model.layers.9``; null: the datamodule's ``hook``.
        site: ``output`` of the submodule or its first ``input``; null: the datamodule's ``site``, or ``output``.
        autoencoder: Name of the submodule that is the autoencoder; "": the module itself.
        batches: Batches of text.
        skip_first: Tokens at the beginning of each window whose activations stay; null: as the datamodule leaves them out, or 0.
        every_n_epochs: Validation epochs from one measurement to the next; testing always measures.

    Raises:
        ValueError: An argument out of range; in ``setup`` and while running, what is refused.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Loss recovered", ("loss_recovered/val_share", "loss_recovered/test_share"), note="1: as good as the activations.", goal="max"
        ),
        Curve(
            "Cross-entropy of the language model (nats)",
            (
                "loss_recovered/val_original",
                "loss_recovered/val_spliced",
                "loss_recovered/val_zero",
                "loss_recovered/test_original",
                "loss_recovered/test_spliced",
                "loss_recovered/test_zero",
            ),
        ),
    )

    def __init__(
        self,
        language_model: nn.Module | None = None,
        text: pl.LightningDataModule | None = None,
        hook: str | None = None,
        site: Site | None = None,
        autoencoder: str = "",
        batches: int = 8,
        skip_first: int | None = None,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(autoencoder)
        checks.one_of(Site, site=site)
        checks.at_least(1, batches=batches, every_n_epochs=every_n_epochs)
        checks.at_least(0, skip_first=skip_first)
        self.language_model, self.text, self.hook, self.site = language_model, text, hook, site
        self.batches, self.skip_first, self.every_n_epochs = batches, skip_first, every_n_epochs

    def _given(self, trainer: pl.Trainer, name: str, of_data: str) -> Any:
        """An argument, or what the datamodule has."""
        value = getattr(self, name)
        return getattr(trainer.datamodule, of_data, None) if value is None else value  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can't be measured; read the text."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            return

        with checks.naming(type(self).__name__):
            model, text, hook = self._given(trainer, "language_model", "model"), self._given(trainer, "text", "text"), self._hook(trainer)
            if model is None or text is None or hook is None:
                missing = [name for name, one in (("language_model", model), ("text", text), ("hook", hook)) if one is None]
                data = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
                raise ValueError(f"{', '.join(missing)} isn't given and {data} has none: give it, or data such as HarvestedActivations")
            named_module(model, hook)
        text.prepare_data()
        text.setup("validate")

    def _hook(self, trainer: pl.Trainer) -> Any:
        return self._given(trainer, "hook", "hook")

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Measure and log."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            with checks.naming(type(self).__name__), isolate_rng(pl_module.device.type == "cuda"):
                sums = self._measure(trainer, pl_module)
            if not trainer.sanity_checking:
                original, replaced, zero = sums[:3] / sums[3]
                values = {"share": loss_recovered(original, replaced, zero), "original": original, "spliced": replaced, "zero": zero}
                log_global(pl_module, {f"loss_recovered/{split}_{name}": value.float() for name, value in values.items()})
        super().end_evaluation(trainer, pl_module, split)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        """(4,) float64: the sums of all ranks."""
        model, text = self._given(trainer, "language_model", "model"), self._given(trainer, "text", "text")
        site: Site = self._given(trainer, "site", "site") or "output"
        skip, data = self.skip_first, trainer.datamodule  # type: ignore[attr-defined]
        if skip is None:
            skip = 0 if data is None else data.hparams.get("skip_first", 0)
        found, dtype = self.judged, self.directions.dtype

        def reconstruct(x: Tensor) -> Tensor:
            whole = getattr(found, "reconstruct", None)
            x = x.to(dtype)
            return found.decode(found.encode(x)) if whole is None else whole(x)  # type: ignore[no-any-return]

        loaders = text.val_dataloader()
        loader = loaders[0] if isinstance(loaders, list) else loaders
        number = 1 if trainer.sanity_checking else self.batches
        share = range(distributed.rank(), number, distributed.world_size())
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):  # its batches are this rank's already
            share = range(len(share))
        mine = islice(loader, share.start, share.stop, share.step)
        sums = torch.zeros(4, dtype=torch.float64, device=pl_module.device)
        model.to(pl_module.device)
        with evaluating(model):
            for batch in mine:
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                sums += torch.stack(spliced_losses(model, batch, self._hook(trainer), reconstruct, site, skip))
        return distributed.sum_over_ranks(sums)


__all__ = ["LossRecovered", "SplicedLosses", "loss_recovered", "spliced_losses"]
