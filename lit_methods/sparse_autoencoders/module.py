"""One LightningModule for sparse autoencoders: what differs between them is the activation, a pure function, and the penalties.

The order of a step (counter before the loss, gradient of the decoder projected behind the clipping, unit rows before the optimiser's step)
is that of bartbussmann/BatchTopK's code, which top-AFA and AbsTopK build on; ``renormalize: after`` is the other custom.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.evaluated import Evaluated, Part
from lit_methods.panels import Curve, Panel
from lit_methods.seeds import own_seed
from lit_methods.sparse_autoencoders import activations, dead
from lit_methods.sparse_autoencoders.activations import ACTIVATIONS, ENCODER_BIAS, LEARNED, PENALTIES, EncoderBias
from lit_methods.sparse_autoencoders.dictionary import (
    Code,
    EncoderStart,
    LossScale,
    Normalization,
    decode,
    dense,
    initial_weights,
    normalized_mse,
    project,
    project_gradient,
    reconstruction_loss,
    standardize,
    unit_rows,
    wide,
)
from lit_methods.steps import log_global

Renormalize = Literal["before", "after", "none"]
FOR_ACTIVATIONS = ("projection", "x", "centred", "decoder_norms", *LEARNED)
FOR_PENALTIES = (*FOR_ACTIVATIONS, "u", "reconstruction", "decoder", "decoder_bias")


def activations_of(batch: Any) -> Tensor:
    """(N, d) activations of a batch: its ``activation``, its first part, or itself; dimensions before the last are samples.

    Raises:
        TypeError: The batch holds no floating-point tensor there.
    """
    found = batch.get("activation") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        have = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f'the batch is {have}: give {{"activation": (B, width) floating point}}, such a tensor, or a tuple with it in front'
        )
    return found.flatten(0, -2)


class Losses(NamedTuple):
    """What a training batch gives.

    Attributes:
        loss: Sum of all parts, scalar.
        l2: Squared error.
        aux: Loss of the dead features, times its factor.
        penalties: Name -> penalty times its factor.
        code: (B, h).
        x: (B, d) normalised inputs.
        reconstruction: (B, d) of these.
        output: (B, d) reconstruction in the inputs' scale.
    """

    loss: Tensor
    l2: Tensor
    aux: Tensor
    penalties: dict[str, Tensor]
    code: Code
    x: Tensor
    reconstruction: Tensor
    output: Tensor


def restored(reconstruction: Tensor, mean: Tensor | None, factor: Tensor) -> Tensor:
    """A normalised reconstruction (B, d) in the scale of the inputs."""
    return reconstruction * factor if mean is None else reconstruction * factor + mean


class SparseAutoencoder(Evaluated):
    """Learns a dictionary of features, and codes of few of them, that reconstruct activations: z = f(W_enc (x - b)), x_hat = z W_dec + b.

    The loss is the squared error, plus each penalty times its factor, plus a loss that lets dead features reconstruct what is left.
    ``activation`` is one of the functions of :mod:`~lit_methods.sparse_autoencoders.activations`, or one of your own::

        def strongest_half(u):  # in my_activations.py; u (B, features) are the pre-activations
            return u * (u > u.median(dim=1, keepdim=True).values)

        activation: my_activations.strongest_half  # in YAML

    Runs: batches hold ``activation`` (B, width) floating point. Sparse codes (topk, batchtopk, abstopk) are decoded without a dense
    product. The rows of the decoder have unit norm: behind the gradient clipping, the part of its gradient along each row is taken out.
    Features are dead that were inactive, on all ranks, in ``dead_after`` training batches in a row; micro-batches count as batches.
    BatchTopK, and AbsTopK with ``per_batch``, keep k B entries of each rank's batch by itself, also in evaluation. Validation and test log
    ``val_nmse``, ``val_l2``, ``val_l0`` and ``val_dead``, the share of features that no sample activates. Statistics of the inputs
    (``normalize: norm_*``, ``bias_from_data``) are those of the first training batch.

    Saves: weights, counter of inactive batches, scale of the inputs. A fixed encoder bias is a buffer, which no optimiser moves.

    Refuses: k above ``features``, settings that the activation lacks or doesn't know, batches of another width.

    Methods for judging: ``encode(x)`` (B, h), ``decode(z)`` (B, d), ``decoder_directions`` (h, d), ``decoder_bias`` (d,), in the
    space of ``normalized(x)``; ``reconstruct(x)`` is back in the input's. Hooks on the submodule ``pre_activation`` see u (B, h).

    Args:
        width: Size d of an activation.
        features: Size h of the dictionary.
        activation: relu, gated, jumprelu, topk, batchtopk, topafa, abstopk, gba, proximal, or the dotted path of a function.
        settings: What the activation and the penalties take, such as ``{k: 32}``; null: nothing.
        penalties: Penalty -> factor: l1, l0 (JumpReLU), gate_l1 and gate_reconstruction (gated), afa, or dotted paths; null: none.
        encoder_bias: ``none``, ``learned``, or ``fixed``: a buffer for callbacks that set it. Null: as the activation has it.
        tied: The encoder's rows are the decoder's.
        encoder_start: The encoder's rows begin in the decoder's directions: with norms as ``kaiming`` initialisation gives, sqrt(2 width /
            features) about (BatchTopK's code), or as those of the ``decoder``, 1 (amakelov/sae).
        output_scale: Where a learned factor of each feature's output begins; null: there is none.
        centre: The decoder's bias is subtracted before encoding.
        normalize: ``none``; ``sample``: each sample with mean 0 and standard deviation 1; ``norm_1``, ``norm_sqrt``: all divided by one
            number, so that their mean norm is 1, or sqrt(width).
        bias_from_data: The decoder's bias begins as the mean of the first training batch, not at 0.
        loss: Squared error, mean over the batch: ``mean`` over the width too, ``sum`` over it, or ``half_sum``.
        renormalize: Decoder rows are set to unit norm ``before`` each optimiser step (BatchTopK's code), ``after`` it, or never: ``none``.
        aux_coeff: Factor of the loss of dead features, >= 0; 0: without.
        aux_features: Dead features that each sample takes for it, >= 1.
        dead_after: Training batches in a row without activity that make a feature dead, >= 1.
        resample_at: Optimiser steps after which dead features begin anew, out of samples that are reconstructed badly.
        resample_warmup: Steps over which the learning rate then rises from a tenth; 0: at once.
        learning_rate: Adam's.
        betas: Adam's two decay rates.
        seed: Seed of the resampling.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("sae/loss", "sae/l2", "sae/aux"), goal="min"),
        Curve("Penalties", ("sae/penalty/*",), note="Each times its factor."),
        Curve("Normalised error", ("sae/nmse", "sae/val_nmse", "sae/test_nmse"), note="Of the input's squared norm.", goal="min"),
        Curve("Active features of a sample (L0)", ("sae/l0", "sae/val_l0", "sae/test_l0")),
        Curve("Sum of magnitudes (L1)", ("sae/l1",)),
        Curve("Dead features", ("sae/dead",), note="Inactive for dead_after batches; their number."),
        Curve("Features that no sample activates", ("sae/val_dead", "sae/test_dead"), note="Share.", goal="min"),
    )

    num_batches_not_active: Tensor
    input_scale: Tensor
    begun: Tensor

    def __init__(
        self,
        width: int,
        features: int,
        activation: str | Callable[..., Any] = "topk",
        settings: dict[str, Any] | None = None,
        penalties: dict[str, float] | None = None,
        encoder_bias: EncoderBias | None = None,
        tied: bool = False,
        encoder_start: EncoderStart = "kaiming",
        output_scale: float | None = None,
        centre: bool = True,
        normalize: Normalization = "none",
        bias_from_data: bool = False,
        loss: LossScale = "mean",
        renormalize: Renormalize = "before",
        aux_coeff: float = 1 / 32,
        aux_features: int = 512,
        dead_after: int = 5,
        resample_at: Sequence[int] = (),
        resample_warmup: int = 0,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(SparseAutoencoder, locals())
        checks.at_least(2 if normalize == "sample" else 1, "the size of an activation", width=width)
        checks.at_least(1, "features", features=features, aux_features=aux_features)
        checks.at_least(1, "batches", dead_after=dead_after)
        checks.at_least(0, aux_coeff=aux_coeff, resample_warmup=resample_warmup, seed=seed)
        checks.positive(learning_rate=learning_rate, output_scale=output_scale)
        checks.betas(betas=betas)
        for step in resample_at:
            checks.at_least(1, "optimiser steps", resample_at=step)
        self._activation = activations.resolve(activation, ACTIVATIONS, "activation")
        if not isinstance(activation, str):
            activation = f"{activation.__module__}.{activation.__qualname__}"  # hyperparameters are text
        self.settings, self.penalties = dict(settings or {}), dict(penalties or {})
        self._penalties = {name: activations.resolve(name, PENALTIES, "penalty") for name in self.penalties}
        activations.check_settings(activation, {activation: self._activation, **self._penalties}, FOR_PENALTIES, self.settings)
        checks.at_least(1, "features of a sample", k=self.settings.get("k", 1))
        if features < self.settings.get("k", 1):
            raise ValueError(f"settings has k={self.settings['k']}, and there are {features} features: give a smaller k, or more features")
        self.save_hyperparameters()
        self.width, self.features, self.activation, self.normalize = width, features, activation, normalize
        self.centre, self.bias_from_data, self.loss_scale, self.renormalize = centre, bias_from_data, loss, renormalize
        self.aux_coeff, self.aux_features, self.dead_after = aux_coeff, aux_features, dead_after
        self.resample_at, self.resample_warmup, self.seed = tuple(resample_at), resample_warmup, seed
        self.learning_rate, self.betas = learning_rate, (betas[0], betas[1])
        self.signed = activation == "abstopk" or bool(getattr(self._activation, "signed", False))
        bias = ENCODER_BIAS.get(activation, "none") if encoder_bias is None else encoder_bias

        encoder, decoder = initial_weights(width, features, encoder_start)
        self.decoder = nn.Parameter(decoder)
        self.encoder = None if tied else nn.Parameter(encoder)
        self.decoder_bias = nn.Parameter(torch.zeros(width))
        self.encoder_bias: Tensor | None
        if bias == "learned":
            self.encoder_bias = nn.Parameter(torch.zeros(features))
        else:
            self.register_buffer("encoder_bias", torch.zeros(features) if bias == "fixed" else None)
        self.output_scale = None if output_scale is None else nn.Parameter(torch.full((features,), float(output_scale)))
        functions = (self._activation, *self._penalties.values())
        named = {name for function in functions for name in activations.named_arguments(function)}
        self.learned = nn.ParameterDict({name: nn.Parameter(torch.zeros(features)) for name in LEARNED if name in named})
        self._needs_norms = "decoder_norms" in named
        self.pre_activation = nn.Identity()
        self.register_buffer("num_batches_not_active", torch.zeros(features, dtype=torch.int64))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("begun", torch.tensor(normalize in ("none", "sample") and not bias_from_data))
        self._forget()
        self._begins = False
        self._seen: tuple[Tensor, Tensor] | None = None  # samples and their losses, for resampling

    # ---- what a judge calls ----

    def normalized(self, x: Tensor) -> Tensor:
        """(B, d) inputs as the dictionary sees them."""
        return self._normalize(x)[0]

    def _normalize(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The normalised inputs, and the mean (or None) and factor that map back."""
        if self.normalize == "sample":
            return standardize(wide(x))
        if self.normalize == "none":
            return wide(x), None, self.input_scale
        return wide(x) / self.input_scale, None, self.input_scale

    def pre_activations(self, x: Tensor) -> Tensor:
        """(B, d) inputs -> (B, h) pre-activations, with the encoder's bias where there is one."""
        return self._pre_activations(self.normalized(x))[0]

    def _pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations with and without bias, and the centred inputs, of normalised ones."""
        centred = x - self.decoder_bias if self.centre else x
        projection = project(centred, self.decoder if self.encoder is None else self.encoder)
        u = projection if self.encoder_bias is None else projection + self.encoder_bias
        return self.pre_activation(u), projection, centred

    def _encode(self, x: Tensor) -> tuple[Code, Tensor, dict[str, Any]]:
        """The code of normalised inputs, the pre-activations, and what functions may name."""
        u, projection, centred = self._pre_activations(x)
        offered = {"x": x, "centred": centred, "projection": projection, **self.learned}
        if self._needs_norms:
            offered["decoder_norms"] = self.decoder_directions.norm(dim=1)
        return activations.call(self.activation, self._activation, u, offered, self.settings), u, offered

    def encode(self, x: Tensor) -> Tensor:
        """(B, d) inputs -> (B, h) codes."""
        return dense(self._encode(self.normalized(x))[0])

    @property
    def decoder_directions(self) -> Tensor:
        """(h, d): what each feature adds to a reconstruction when its code is 1."""
        return self.decoder if self.output_scale is None else self.output_scale[:, None] * self.decoder

    def decode(self, code: Code, like: Tensor | None = None) -> Tensor:
        """(B, h) codes -> (B, d) reconstructions.

        Args:
            code: Dense or sparse.
            like: (B, d) inputs whose scale the result takes; None: it stays as the dictionary sees inputs.
        """
        reconstruction = decode(code, self.decoder_directions) + self.decoder_bias
        return reconstruction if like is None else restored(reconstruction, *self._normalize(like)[1:])

    def reconstruct(self, x: Tensor) -> Tensor:
        """(B, d) inputs -> (B, d) reconstructions, in the inputs' scale."""
        return self.decode(self._encode(self.normalized(x))[0], like=x)

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`reconstruct`."""
        return self.reconstruct(x)

    # ---- training ----

    def inputs(self, batch: Any) -> Tensor:
        """(B, width) of a batch.

        Raises:
            ValueError: They have another width.
        """
        x = activations_of(batch)
        if x.shape[1] != self.width:
            raise ValueError(f"the batch holds activations of width {x.shape[1]}, and width is {self.width}: set it to that")
        return x

    def on_train_start(self) -> None:
        """Sees whether the first batch's statistics are wanted; a resumed run has them."""
        self._begins = not bool(self.begun)

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        """Take the statistics of the first training batch."""
        x = wide(x)
        if self.normalize.startswith("norm_"):
            norm = x.norm(dim=1).mean() / (1.0 if self.normalize == "norm_1" else self.width**0.5)
            self.input_scale.copy_(distributed.sum_over_ranks(norm) / distributed.world_size())
        if self.bias_from_data:
            mean = self.normalized(x).mean(dim=0)
            self.decoder_bias.copy_(distributed.sum_over_ranks(mean) / distributed.world_size())
        self.begun.fill_(True)
        self._begins = False

    def losses(self, batch: Any) -> Losses:
        """The parts of the loss of a training batch; counts the inactive features, too, as the loss of the dead ones wants that first."""
        raw = self.inputs(batch)
        x, mean, factor = self._normalize(raw)
        code, u, offered = self._encode(x)
        directions = self.decoder_directions
        reconstruction = decode(code, directions) + self.decoder_bias
        l2 = reconstruction_loss(reconstruction, x, self.loss_scale)

        active = distributed.any_over_ranks(dead.active_features(code))
        self.num_batches_not_active.copy_(dead.count_inactive(self.num_batches_not_active, active))
        aux = l2.new_zeros(())
        if self.aux_coeff:
            residual = x - reconstruction
            aux = dead.auxiliary_loss(u, self.dead, residual, directions, self.aux_features, self.aux_coeff, self.signed)
        penalties = {}
        if self._penalties:
            z = dense(code)
            offered |= batch if isinstance(batch, Mapping) else {}
            offered |= {"x": x, "u": u, "reconstruction": reconstruction, "decoder": directions, "decoder_bias": self.decoder_bias}
            for name, function in self._penalties.items():
                penalties[name] = self.penalties[name] * activations.call(name, function, z, offered, self.settings)
        loss = l2 + aux + sum(penalties.values())
        return Losses(loss, l2, aux, penalties, code, x, reconstruction, restored(reconstruction, mean, factor))

    @property
    def dead(self) -> Tensor:
        """(h,) bool: features that were inactive for ``dead_after`` batches."""
        return self.num_batches_not_active >= self.dead_after

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Squared error, penalties, and the loss of dead features."""
        if self._begins:
            self._begin(self.inputs(batch))
        found = self.losses(batch)
        if self.trainer.global_step + 1 in self.resample_at:
            errors = (found.x - found.reconstruction).detach().square().sum(dim=1)
            self._seen = (found.x - self.decoder_bias).detach(), errors
        with torch.no_grad():
            logs = {"loss": found.loss, "l2": found.l2, "aux": found.aux, **self.sizes(found.code), "dead": self.dead.sum().float()}
            logs |= {f"penalty/{name.rpartition('.')[2]}": value for name, value in found.penalties.items()}
            logs["nmse"] = normalized_mse(found.output, self.inputs(batch))
        self.log_dict({f"sae/{name}": value.detach() for name, value in logs.items()}, batch_size=len(found.x))
        return found.loss

    @staticmethod
    def sizes(code: Code) -> dict[str, Tensor]:
        """Mean number of entries other than 0, and mean sum of magnitudes, of a sample."""
        values, batch = (code, len(code)) if isinstance(code, Tensor) else (code.values, code.shape[0])
        values = wide(values.detach())
        return {"l0": values.count_nonzero() / batch, "l1": values.abs().sum() / batch}

    @torch.no_grad()
    def project_decoder(self) -> None:
        """Takes out of the decoder's gradient what would lengthen its rows; with ``renormalize: before`` also sets these to unit norm."""
        if self.renormalize == "none" or self.decoder.grad is None:
            return
        self.decoder.grad.copy_(project_gradient(self.decoder, self.decoder.grad))
        if self.renormalize == "before":
            self.decoder.copy_(unit_rows(self.decoder))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips; then :meth:`project_decoder`."""
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)
        self.project_decoder()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        """Steps; then unit rows and resampling, where they are asked for."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            if self.renormalize == "after":
                self.decoder.copy_(unit_rows(self.decoder))
            if self._seen is not None:
                self._resample(optimizer, *self._seen)
                self._seen = None

    def _resample(self, optimizer: Any, x: Tensor, losses: Tensor) -> None:
        """Dead features begin anew; every rank takes rank 0's."""
        is_dead = self.dead
        generator = torch.Generator(x.device).manual_seed(own_seed(f"resampling {self.trainer.global_step}", self.seed))
        encoder = self.decoder if self.encoder is None else self.encoder
        decoder_rows, encoder_rows = dead.resampled_rows(is_dead, encoder, x, losses, generator)
        new = [(self.decoder, decoder_rows)] if self.encoder is None else [(self.decoder, decoder_rows), (self.encoder, encoder_rows)]
        if isinstance(self.encoder_bias, nn.Parameter):
            new.append((self.encoder_bias, torch.zeros_like(self.encoder_bias)))
        distributed.broadcast_tensors([values for _, values in new])
        for parameter, values in new:
            rows = is_dead.view(-1, *[1] * (parameter.ndim - 1))
            parameter.copy_(torch.where(rows, values.to(parameter.dtype), parameter))
            dead.reset_moments(getattr(optimizer, "optimizer", optimizer), parameter, is_dead)
        self.num_batches_not_active.masked_fill_(is_dead, 0)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; its learning rate rises again behind each resampling."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=self.betas)
        if not self.resample_at or not self.resample_warmup:
            return optimizer

        def factor(step: int) -> float:
            since = min((step - start for start in self.resample_at if step >= start), default=self.resample_warmup)
            return 0.1 + 0.9 * min(1.0, since / self.resample_warmup)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- evaluation ----

    def on_validation_epoch_start(self) -> None:
        """Begins anew."""
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Begins anew."""
        self._forget()

    def _forget(self) -> None:
        # no buffers: DDP would overwrite them with those of rank 0, also in a validation within fit
        self._eval_sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._eval_active = torch.zeros(self.features, dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def _evaluate(self, batch: Any, batch_idx: int) -> None:
        raw = self.inputs(batch)
        code, _, _ = self._encode(self.normalized(raw))
        reconstruction = self.decode(code, like=raw)
        values = code if isinstance(code, Tensor) else code.values
        sums = [(reconstruction - raw).square().sum(), wide(raw).square().sum(), values.count_nonzero(), raw.new_tensor(len(raw))]
        self._eval_sums += torch.stack([one.double() for one in sums])
        self._eval_active |= dead.active_features(code)

    def _log_evaluation(self, part: Part) -> None:
        error, power, entries, samples = distributed.sum_over_ranks(self._eval_sums)
        active = distributed.any_over_ranks(self._eval_active)
        figures = {
            "nmse": error / power,
            "l2": error / (samples * self.width),
            "l0": entries / samples,
            "dead": 1 - active.double().mean(),
        }
        log_global(self, {f"sae/{part}_{name}": value.float() for name, value in figures.items()})

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The samples' codes ``code`` (B, h) and ``reconstruction`` (B, d)."""
        x = self.inputs(batch)
        code = self._encode(self.normalized(x))[0]
        return {"code": dense(code), "reconstruction": self.decode(code, like=x)}
