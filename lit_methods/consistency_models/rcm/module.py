"""rCM: a diffusion model distilled into one of 1 to 4 steps, by continuous-time consistency with score regularisation (arXiv:2510.08431).

Networks as functions of time: :mod:`~lit_methods.consistency_models.rcm.trigflow`; losses, schedule and sampler:
:mod:`~lit_methods.consistency_models.rcm.core`; attention with its derivative:
:mod:`~lit_methods.consistency_models.rcm.attention_jvp`, and a transformer made of it:
:mod:`~lit_methods.consistency_models.rcm.wan`. Here: the module. sCM (arXiv:2410.11081), score distillation alone
(DMD2, arXiv:2405.14867, without its GAN loss) and discrete consistency distillation are settings of the module. Left out: context
parallelism, GAN losses.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_methods import checks, distributed
from lit_methods.averages import ema_update, power_decay, power_exponent, state_tensors
from lit_methods.catalog import Technique
from lit_methods.consistency_models.evaluation import Purpose, SampleEvaluation
from lit_methods.consistency_models.networks import fourier_features
from lit_methods.consistency_models.rcm.core import (
    MID_TIMES,
    Phase,
    Simulation,
    TangentMode,
    WarmupStyle,
    critic_loss,
    dcm_loss,
    dmd_loss,
    phase_at,
    sample,
    scm_loss,
    simulate,
    total,
)
from lit_methods.consistency_models.rcm.trigflow import (
    Predict,
    Prediction,
    Wrapped,
    guided,
    noisy,
    rectified_flow,
    shift_time,
    trig_time,
    trigflow,
)
from lit_methods.frozen import Frozen
from lit_methods.optim import linear_rise
from lit_methods.panels import Curve, ImagePanel, Panel
from lit_methods.runs.checkpoints import load_into

TECHNIQUE = Technique(
    slug="rcm",
    short="rCM",
    title="Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency",
    arxiv="2510.08431",
    family="consistency_models",
    form="module",
    classes=("lit_methods.RCM", "lit_methods.RingTeacher", "lit_methods.IrisTeacher", "lit_methods.WanTransformer"),
    configs=("rcm.yaml",),
    golden=("attention_jvp", "scaling", "scm_loss", "dcm_loss", "dmd_loss", "critic_loss", "phase_schedule", "sampler"),
    claim=(
        "On a ring of 8 Gaussians, at equal iterations of the student, score distillation beside the continuous-time consistency loss puts "
        "more one-step samples near a mode."
    ),
    summary="Distils a diffusion model into one of 1 to 4 steps, by continuous-time consistency and score distillation; sCM is a setting.",
)

Wrapper = Literal["rectified_flow", "trigflow"]
Consistency = Literal["scm", "dcm", "none"]
Profile = Literal["power", "constant"]
Reduction = Literal["mean", "sum"]


class TimeWeight(nn.Module):
    """A learned w(t) of sCM's loss, 0 at first.

    Args:
        frequencies: Frequencies of the time, see :func:`~lit_methods.consistency_models.networks.fourier_features`.
    """

    def __init__(self, frequencies: int = 8) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear = nn.Linear(2 * frequencies, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, time: Tensor) -> Tensor:
        """(B,) TrigFlow times -> (B,)."""
        answer: Tensor = self.linear(fourier_features(time.to(self.linear.weight.dtype), self.frequencies))[:, 0]
        return answer


class RCM(SampleEvaluation):
    """Distils a diffusion or flow model into a student that draws a sample in 1 to 4 steps.

    The student's velocity F is drawn along the teacher's trajectory by ||F - sg(F) - g / (|g| + eps)||^2 with the tangent g of
    :func:`~lit_methods.consistency_models.rcm.core.scm_loss` (continuous-time consistency), and its samples to where the teacher's score
    and that of a critic agree (score distillation). The critic is a copy of the student that learns the score of the student's samples. An
    iteration is ``accumulate`` batches. At first ``pretrain_iterations`` fit the student to the teacher's velocity, for a student that
    doesn't start as a copy. Then, by :func:`~lit_methods.consistency_models.rcm.core.phase_at`, an iteration trains the student, with the
    consistency loss and, after the warm-up, the score distillation loss, two backward passes and one optimiser step; or it trains the
    critic. The average of the student's weights and the learning rates advance in their own phase. Baselines: sCM is ``dmd_weight: 0``,
    with ``warmup_style: scm`` and ``adaptive_weight: true`` to the letter; discrete consistency distillation is ``consistency: dcm`` with
    ``dmd_weight: 0``; score distillation alone is ``consistency: none`` with ``tangent_warmup: 0``.

    Runs: batches have ``image`` (B, ...) floating point of standard deviation 1, and what ``condition`` names. Optimisation is manual: use
    ``accumulate`` here, not in the trainer, which counts the steps of all optimisers as ``global_step``. Networks train in eval mode,
    without dropout and with fixed running statistics, which have no place in a derivative. Random numbers follow from the seed of the run,
    iteration and rank alone. Under DDP gradients are averaged once an iteration. A sample with a number that isn't finite before the call
    that is differentiated is left out, alone. Where that call itself overflows, its gradients are lost; then this process gives the
    iteration a gradient of 0 (with fp16's loss scaler, which looks itself, the step is left out). Samples and validation use the averaged
    weights. What the teacher's ``evaluate(samples) -> dict`` says, if it has one, is logged as ``rcm/val_<name>``.

    Saves: student, critic, average, optimisers, the count of iterations and the seed; an iteration that is under way begins anew. The
    teacher is made anew.

    Refuses: strategies that shard weights; a student without weights; settings that contradict each other.

    Args:
        teacher: v(x, 1000 u) or F(x, t), see ``wrapper``: (B, ...), (B,) and a condition, if any -> (B, ...). Frozen.
        student: A network of the same signature; None: a copy of the teacher.
        teacher_weights: File with the teacher's weights: a plain state dict, or a checkpoint of Lightning. None: it has them.
        teacher_prefix: Prefix of the weights' names in the file, such as ``network.``.
        wrapper: ``rectified_flow``: networks are velocities of rectified flow; ``trigflow``: they are F(x_t, t).
        consistency: ``scm`` (rCM and sCM), ``dcm`` or ``none``.
        consistency_weight: Factor of that loss.
        dmd_weight: Factor of score distillation; 0: none, and no critic.
        guidance: Classifier-free guidance of the teacher; 1 or less: none.
        condition: Key of the condition in the batch, such as ``label``; None: there is none.
        null_condition: What the unconditional teacher is told, where the batch has no ``null_<condition>``: a number that fills the
            condition.
        time_mean: Mean of ln tan t of the consistency loss: 0.7 (Wan 1.3B), 1.5 (14B).
        time_std: Standard deviation of ln tan t.
        time_shift: Shift of the times of score distillation and critic, by
            :func:`~lit_methods.consistency_models.rcm.trigflow.shift_time`.
        tangent_warmup: H, iterations in which r rises to 1, without score distillation: 1000 (1.3B), 0 (14B).
        student_every: One iteration in so many is the student's afterwards: 5 (1.3B), 10 (14B).
        max_simulation_steps: Samples of the student take 1 to this many steps, in turn.
        fixed_times: Simulate with the times 1.5, 1.4, 1.0 instead of random ones.
        tangent_eps: Added to the norm of g.
        warmup_style: ``rcm`` or ``scm``, see :func:`~lit_methods.consistency_models.rcm.core.scm_loss`.
        adaptive_weight: Learn sCM's weight w(t) of the loss, with the student's optimiser; ``consistency_weight: 1`` goes with it.
        tangent_mode: See :func:`~lit_methods.consistency_models.rcm.core.velocity_tangent`; ``jvp`` is exact.
        dcm_steps: Intervals of the time axis, for ``dcm``.
        dcm_skip: Intervals between the two points of a pair.
        pretrain_iterations: Iterations of regression to the teacher, before iteration 0.
        pretrain_learning_rate: Adam's learning rate in these iterations.
        learning_rate: AdamW's learning rate of the student.
        critic_learning_rate: AdamW's learning rate of the critic.
        betas: AdamW's two momentum decay rates, of both.
        weight_decay: AdamW's weight decay, of both.
        lr_warmup: Iterations of its phase over which each learning rate rises to its value.
        ema_profile: ``power``, see :func:`lit_methods.averages.power_decay`, or ``constant``.
        ema_width: Width of the ``power`` profile, see :func:`lit_methods.averages.power_exponent`.
        ema_shift: Iterations that the ``power`` profile takes as done before.
        ema_decay: Decay of the ``constant`` profile.
        accumulate: Batches per iteration.
        reduction: ``mean`` over the batch, or ``sum``, as the authors, whose batch is 1.
        sigma_max: Where sampling starts: 80; 1600 is sharper and less diverse.
        mid_times: Times of the steps after the first.
        sample_steps: Numbers of steps that validation and predictions use.
        grid: Samples of a picture; 0: none.

    Raises:
        FileNotFoundError: No ``teacher_weights`` there.
        ValueError: An argument outside its range, two that contradict each other, or weights of another network.
    """

    prefix: ClassVar[str] = "rcm"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Tangent",
            ("rcm/tangent_norm", "rcm/df_dt"),
            note="Mean ln of the norm before normalisation: falls as the student becomes consistent.",
        ),
        Curve("Losses", ("rcm/consistency_loss", "rcm/dmd_loss", "rcm/critic_loss", "rcm/pretrain_loss")),
        Curve("Phases", ("rcm/student_phase", "rcm/warmup_ratio", "rcm/ema_decay", "rcm/simulation_steps")),
        Curve(
            "Numbers that aren't finite",
            ("rcm/bad_samples", "rcm/bad_simulations", "rcm/bad_gradients"),
            note="Samples of a batch that were left out, and 1 where a whole gradient was.",
            goal="min",
        ),
        Curve("Distance of samples to data", ("rcm/val_sw2*",), note="Sliced Wasserstein; lower is better.", goal="min"),
        Curve("Quality", ("rcm/val_quality*",), note="Share of samples near a mode, where the teacher knows its modes.", goal="max"),
        Curve("Modes", ("rcm/val_modes*",), note="How many modes have samples.", goal="max"),
        ImagePanel("Samples", "rcm/samples", note="Data, if they are points, and samples of the averaged weights in each number of steps."),
    )

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | None = None,
        teacher_weights: str | None = None,
        teacher_prefix: str = "",
        wrapper: Wrapper = "rectified_flow",
        consistency: Consistency = "scm",
        consistency_weight: float = 100.0,
        dmd_weight: float = 1.0,
        guidance: float = 1.0,
        condition: str | None = None,
        null_condition: float = 0,
        time_mean: float = 0.7,
        time_std: float = 1.6,
        time_shift: float = 5.0,
        tangent_warmup: int = 1000,
        student_every: int = 5,
        max_simulation_steps: int = 4,
        fixed_times: bool = False,
        tangent_eps: float = 0.1,
        warmup_style: WarmupStyle = "rcm",
        adaptive_weight: bool = False,
        tangent_mode: TangentMode = "jvp",
        dcm_steps: int = 48,
        dcm_skip: int = 1,
        pretrain_iterations: int = 0,
        pretrain_learning_rate: float = 1e-3,
        learning_rate: float = 2e-6,
        critic_learning_rate: float = 4e-7,
        betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 0.01,
        lr_warmup: int = 0,
        ema_profile: Profile = "power",
        ema_width: float = 0.1,
        ema_shift: int = 0,
        ema_decay: float = 0.99,
        accumulate: int = 1,
        reduction: Reduction = "mean",
        sigma_max: float = 80.0,
        mid_times: Sequence[float] = MID_TIMES,
        sample_steps: Sequence[int] = (1, 2, 4),
        grid: int = 16,
    ) -> None:
        super().__init__()
        checks.literals(RCM, locals())
        checks.at_least(1, student_every=student_every, max_simulation_steps=max_simulation_steps, accumulate=accumulate, dcm_skip=dcm_skip)
        checks.at_least(0, "iterations", tangent_warmup=tangent_warmup, pretrain_iterations=pretrain_iterations, lr_warmup=lr_warmup)
        checks.at_least(0, ema_shift=ema_shift, dmd_weight=dmd_weight, consistency_weight=consistency_weight)
        checks.share(ema_decay=ema_decay)
        checks.positive(time_std=time_std, time_shift=time_shift, tangent_eps=tangent_eps, sigma_max=sigma_max)
        checks.positive(
            pretrain_learning_rate=pretrain_learning_rate, learning_rate=learning_rate, critic_learning_rate=critic_learning_rate
        )
        checks.betas(betas=betas)
        checks.at_least(0, guidance=guidance, weight_decay=weight_decay, grid=grid)
        if dcm_skip > dcm_steps:
            raise ValueError(f"dcm_skip is {dcm_skip}: give 1 to dcm_steps={dcm_steps}")
        if adaptive_weight and consistency != "scm":
            raise ValueError(f"adaptive_weight is a part of consistency: scm, not of {consistency}: leave it out")
        if consistency == "none" and (dmd_weight == 0 or tangent_warmup > 0):
            raise ValueError("consistency: none leaves score distillation alone: give a dmd_weight above 0 and tangent_warmup: 0")
        if fixed_times and max_simulation_steps > len(MID_TIMES) + 1:
            raise ValueError(f"there are fixed_times for {len(MID_TIMES) + 1} steps, not for max_simulation_steps={max_simulation_steps}")
        if guidance > 1 and condition is None:
            raise ValueError(f"guidance is {guidance}, but there is no condition: name its key in the batch, or give guidance: 1")
        top = math.atan(sigma_max)
        if list(mid_times) != sorted(mid_times, reverse=True) or any(not 0 < time < top for time in mid_times):
            raise ValueError(f"mid_times are {list(mid_times)}: give descending times between 0 and arctan(sigma_max) = {top:.4f}")
        if not sample_steps or any(not 1 <= steps <= len(mid_times) + 1 for steps in sample_steps):
            raise ValueError(f"sample_steps are {list(sample_steps)}: give numbers from 1 to {len(mid_times) + 1}, one more than mid_times")
        if teacher_weights is not None:
            load_into(teacher, teacher_weights, teacher_prefix)
        if student is None:
            student = copy.deepcopy(teacher)
        if not any(True for _ in student.parameters()):
            raise ValueError(f"the student, a {type(student).__name__}, has no weights: give a student, for a teacher without weights")
        self.save_hyperparameters(ignore=["teacher", "student"])
        self.automatic_optimization = False
        self.teacher = Frozen(teacher)
        self.student = student.requires_grad_(True)
        self.critic = copy.deepcopy(student) if dmd_weight > 0 else None
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.weighting = TimeWeight() if adaptive_weight else None
        self.sample_steps, self.grid = tuple(sample_steps), grid
        self._exponent = power_exponent(ema_width) if ema_profile == "power" else 0.0
        self._done = 0  # iterations, those of pretraining too
        self._batches = 0  # of the iteration under way
        self._seed: int | None = None
        self._notes: dict[str, Tensor | float] = {}

    # ---- networks ------------------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, time: Tensor, *condition: Tensor) -> Prediction:
        """x0 and velocity that the averaged student predicts: (B, ...), (B,) TrigFlow times -> (B, ...) float64 twice."""
        return self._predict(self.average, x.dtype, condition)(x, time)

    def _predict(self, network: nn.Module, dtype: torch.dtype, condition: tuple[Tensor, ...]) -> Wrapped:
        wrap = rectified_flow if self.hparams["wrapper"] == "rectified_flow" else trigflow
        return wrap(network, dtype, *condition)

    def _teach(self, batch: dict[str, Tensor], dtype: torch.dtype, condition: tuple[Tensor, ...]) -> Predict:
        hp = self.hparams
        conditional = self._predict(self.teacher, dtype, condition)
        if hp["guidance"] <= 1:
            return conditional
        null = batch.get(f"null_{hp['condition']}", torch.full_like(condition[0], hp["null_condition"]))
        return guided(conditional, self._predict(self.teacher, dtype, (null,)), hp["guidance"])

    def _condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        name = self.hparams["condition"]
        return () if name is None else (batch[name],)

    def on_train_epoch_start(self) -> None:
        """Dropout and running statistics have no place in a derivative."""
        for network in (self.student, self.critic, self.average):
            if network is not None:
                network.eval()

    # ---- random numbers ------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Take over the seed of the run; refuse what can't work."""
        strategy = type(self.trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(f"RCM differentiates whole networks forwards, but {strategy} shards them: use strategy='ddp'")
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**63

    def generator(self) -> torch.Generator:
        """Random numbers of this batch: other ones on each rank, the same after a resume."""
        import numpy as np

        assert self._seed is not None
        words = np.random.SeedSequence([self._seed, self._done, self._batches, self.global_rank]).generate_state(2)
        return torch.Generator(self.device).manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def normal(self, shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers of ``shape``, of the dtype and on the device of ``like``."""
        return torch.randn(*shape, generator=generator, dtype=like.dtype, device=like.device)

    def uniform(self, shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform float64 numbers in [0, 1) on the device of ``like``."""
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device=like.device)

    def _consistency_times(self, x: Tensor, generator: torch.Generator) -> Tensor:
        hp = self.hparams
        return (hp["time_mean"] + hp["time_std"] * self.normal((len(x),), x.double(), generator)).exp().atan()

    def _score_times(self, shape: Sequence[int], x: Tensor, generator: torch.Generator) -> Tensor:
        # a time of 0 has no score
        return trig_time(shift_time(self.uniform(shape, x, generator), self.hparams["time_shift"])).clamp(min=1e-6)

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Iterations done; negative while the student is pretrained."""
        return self._done - int(self.hparams["pretrain_iterations"])

    def phase(self) -> Phase:
        """Of the iteration under way, 0 while the student is pretrained."""
        hp = self.hparams
        settings = (hp["tangent_warmup"], hp["student_every"], hp["max_simulation_steps"])
        return phase_at(max(0, self.iteration), *settings, dmd=self.critic is not None)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One batch; at the last one of an iteration an optimiser steps."""
        phase, x, generator = self.phase(), batch["image"], self.generator()
        device = self.device.type
        # the cached casts of weights that a call without gradient leaves behind would cut the graph of the next call
        casts = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False)
        with casts, self._unsynchronised():
            if self.iteration < 0:
                name = "pretrain"
                self._backward(self._pretrain_losses(batch, x, generator))
            elif phase.is_student:
                name = "student"
                for losses in self._student_losses(batch, x, generator, phase):
                    self._backward(losses)
            else:
                name = "critic"
                self._backward(self._critic_losses(batch, x, generator, phase))
        self._batches += 1
        if self._batches == self.hparams["accumulate"]:
            self._step(name, phase)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.trainer.fit_loop.total_batch_idx + 1) % every == 0:
            self.log_dict({f"rcm/{name}": torch.as_tensor(value, dtype=torch.float32) for name, value in self._notes.items()})
            self._notes = {}

    def _note(self, **values: Tensor | float) -> None:
        """To be logged with the next entry: a call of ``log`` for each value and batch takes as long as a small network."""
        self._notes |= values

    def _pretrain_losses(self, batch: dict[str, Tensor], x: Tensor, generator: torch.Generator) -> Tensor:
        time = self._consistency_times(x, generator)
        xt = noisy(x.double(), self.normal(x.shape, x, generator).double(), time)
        condition = self._condition(batch)
        target = self._predict(self.teacher, x.dtype, condition)(xt, time).velocity
        losses = (self._predict(self.student, x.dtype, condition)(xt, time).velocity - target).square().flatten(1).mean(1)
        self._note(pretrain_loss=losses.detach().mean())
        return losses

    def _student_losses(self, batch: dict[str, Tensor], x: Tensor, generator: torch.Generator, phase: Phase) -> Iterator[Tensor]:
        hp, condition = self.hparams, self._condition(batch)
        student, teacher = self._predict(self.student, x.dtype, condition), self._teach(batch, x.dtype, condition)
        self._note(student_phase=1.0, warmup_ratio=phase.warmup_ratio)
        if hp["consistency"] == "scm":
            noise, time = self.normal(x.shape, x, generator), self._consistency_times(x, generator)
            styles = (hp["warmup_style"], hp["tangent_mode"], None if self.weighting is None else self.weighting(time))
            scm = scm_loss(student, teacher, x, noise, time, phase.warmup_ratio, hp["consistency_weight"], hp["tangent_eps"], *styles)
            self._note(
                consistency_loss=scm.losses.detach().mean(),
                tangent_norm=scm.tangent_norm.clamp(min=1e-12).log().mean(),
                df_dt=total(scm.df_dt.square()).sqrt().mean(),
                bad_samples=(~scm.good).sum(),
            )
            yield scm.losses
        elif hp["consistency"] == "dcm":
            noise, uniform = self.normal(x.shape, x, generator), self.uniform((len(x),), x, generator)
            settings = (hp["dcm_steps"], hp["dcm_skip"], hp["time_shift"], hp["consistency_weight"])
            pair = dcm_loss(student, teacher, x, noise, uniform, *settings)
            self._note(consistency_loss=pair.losses.detach().mean(), bad_samples=(~pair.good).sum())
            yield pair.losses
        if self.critic is not None and self.iteration >= hp["tangent_warmup"]:
            made = self._simulate(student, x, generator, phase.simulation_steps)
            noise, time = self.normal(x.shape, x, generator), self._score_times((len(x),), x, generator)
            scored = dmd_loss(self._predict(self.critic, x.dtype, condition), teacher, made.x0, noise, time, hp["dmd_weight"])
            self._note(dmd_loss=scored.losses.detach().mean(), dmd_weight=scored.weight.mean())
            self._note(simulation_steps=phase.simulation_steps, bad_simulations=(~scored.good).sum())
            yield scored.losses

    def _critic_losses(self, batch: dict[str, Tensor], x: Tensor, generator: torch.Generator, phase: Phase) -> Tensor:
        assert self.critic is not None
        condition = self._condition(batch)
        with torch.no_grad():
            made = self._simulate(self._predict(self.student, x.dtype, condition), x, generator, phase.simulation_steps)
        noise, time = self.normal(x.shape, x, generator), self._score_times((len(x),), x, generator)
        scored = critic_loss(self._predict(self.critic, x.dtype, condition), made.x0, noise, time)
        self._note(critic_loss=scored.losses.detach().mean(), student_phase=0.0)
        self._note(simulation_steps=phase.simulation_steps, bad_simulations=(~scored.good).sum())
        return scored.losses

    def _simulate(self, student: Predict, x: Tensor, generator: torch.Generator, steps: int) -> Simulation:
        start, noises = self.normal(x.shape, x, generator), self.normal((steps - 1, *x.shape), x, generator)
        draws = None if self.hparams["fixed_times"] else self._score_times((steps - 1, len(x)), x, generator)
        return simulate(student, start, noises, draws)

    # ---- optimisation --------------------------------------------------------------------------------------------------------------------

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """DDP expects a gradient of every weight in every backward pass; here they are averaged by hand, once an iteration."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _backward(self, losses: Tensor) -> None:
        loss = losses.mean() if self.hparams["reduction"] == "mean" else losses.sum()
        self.manual_backward(loss / self.hparams["accumulate"])

    def _step(self, name: str, phase: Phase) -> None:
        index = self._roles().index(name)
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        scheduler = schedulers[index] if isinstance(schedulers, list) else schedulers
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a loss scaler must see them: it leaves the step out itself
            self._note(bad_gradients=drop_bad_gradients(parameters))
        distributed.average_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()  # type: ignore[call-arg]
        hp = self.hparams
        if name == "student":
            decay = power_decay(phase.effective + hp["ema_shift"], self._exponent) if hp["ema_profile"] == "power" else hp["ema_decay"]
            ema_update(state_tensors(self.average), state_tensors(self.student), decay)
            self._note(ema_decay=decay)
        self._done += 1
        self._batches = 0
        if name == "pretrain" and self.iteration == 0:  # what comes starts from the student as it is now
            for follower in (self.average, self.critic):
                if follower is not None:
                    ema_update(state_tensors(follower), state_tensors(self.student), 0.0)

    def _roles(self) -> list[str]:
        roles = ["student"] + ["critic"] * (self.critic is not None)
        return roles + ["pretrain"] * (self.hparams["pretrain_iterations"] > 0)

    def configure_optimizers(self) -> Any:
        """AdamW for student and critic, Adam for pretraining, each with a learning rate that counts the iterations of its own phase."""
        hp = self.hparams
        common = {"betas": tuple(hp["betas"]), "weight_decay": hp["weight_decay"]}
        learned = [*self.student.parameters(), *(() if self.weighting is None else self.weighting.parameters())]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(learned, lr=hp["learning_rate"], **common)]
        if self.critic is not None:
            optimizers.append(torch.optim.AdamW(self.critic.parameters(), lr=hp["critic_learning_rate"], **common))
        if hp["pretrain_iterations"] > 0:
            optimizers.append(torch.optim.Adam(self.student.parameters(), lr=hp["pretrain_learning_rate"]))
        rise = partial(linear_rise, warmup_steps=hp["lr_warmup"])
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, rise) for optimizer in optimizers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The count and the seed; an iteration that is under way begins anew."""
        checkpoint["rcm"] = {"done": self._done, "seed": self._seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        state = checkpoint.get("rcm", {})
        self._done, self._seed, self._batches = state.get("done", 0), state.get("seed"), 0

    # ---- sampling ------------------------------------------------------------------------------------------------------------------------

    def sample(self, noise: Tensor, steps: int = 1, *condition: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the averaged student.

        Args:
            noise: (B, ...) standard normal, the shape of a batch of data.
            steps: 1 to ``len(mid_times) + 1``.
            condition: (B, ...), with ``condition``.
            generator: Draws the noise between steps; on the device of ``noise``.

        Returns:
            (B, ...), dtype of ``noise``.

        Raises:
            ValueError: Another number of steps.
        """
        hp = self.hparams
        if not 1 <= steps <= len(hp["mid_times"]) + 1:
            raise ValueError(f"{steps} steps need {steps - 1} mid_times: give them, or fewer steps")
        between = [torch.randn(noise.shape, generator=generator, dtype=noise.dtype, device=noise.device) for _ in range(steps - 1)]
        student = self._predict(self.average, noise.dtype, condition)
        return sample(student, noise, between, hp["mid_times"][: steps - 1], hp["sigma_max"]).to(noise.dtype)

    def _draw_samples(self, batch: dict[str, Tensor], batch_idx: int, purpose: Purpose) -> dict[int, Tensor]:
        seed = (0 if purpose == "evaluation" else 2_000_001) + 2 * self.global_batch(batch_idx)
        data = batch["image"]
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(data)
        again = {steps: torch.Generator(data.device).manual_seed(seed + 1) for steps in self.sample_steps}
        return {steps: self.sample(noise, steps, *self._condition(batch), generator=again[steps]) for steps in self.sample_steps}

    def sample_metrics(self, samples: Tensor) -> Mapping[str, Tensor]:
        """What the teacher says of samples, if it has ``evaluate``."""
        evaluate = getattr(self.teacher.module, "evaluate", None)
        return {} if evaluate is None else evaluate(samples.to(self.device))  # type: ignore[no-any-return]


def drop_bad_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Set all gradients to 0 where any has a number that isn't finite, or a norm beyond its dtype; without waiting for the device.

    Returns:
        Scalar float32, 1 where they were dropped, else 0.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    bad = ~torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).isfinite().all()
    for gradient in gradients:
        gradient.masked_fill_(bad, 0.0)
    return bad.float()
