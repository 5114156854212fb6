"""Where the models of a soup are checked, scored and averaged: one module, one datamodule, one process."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from lit_methods.callbacks.batch import inputs_and_labels, logits_of, require_logits
from lit_methods.callbacks.sparsity.sparse_model_soups.core import (
    batch_norms,
    check_alike,
    diversity,
    ensemble_probabilities,
    greedy_selection,
    masked_state,
    pruned_masks,
    recalibrating,
    uniform_soup,
)
from lit_methods.claims.runner import why_missing
from lit_methods.cli.lightning_cli import planned
from lit_methods.cli.quiet import quiet
from lit_methods.compiled import names_in, plain_names
from lit_methods.errors import CommandError
from lit_methods.runs.checkpoints import AtomicCheckpointIO, UnreadableCheckpoint, check_readable

_OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops")  # what a soup has none of

State = dict[str, Tensor]


def imp_state(checkpoint: Path) -> dict[str, Any]:
    """What IMP has left in a checkpoint: masks, phase, rates; {} where there is nothing.

    Raises:
        CommandError: The file can't be read.
    """
    try:
        return _imp_state(check_readable(checkpoint))[1]
    except UnreadableCheckpoint as error:
        raise CommandError(f"{error}\n  delete the folder of its run, and it is done again", exit_code=1) from error


def _imp_state(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    found = [(key, state) for key, state in (content.get("callbacks") or {}).items() if key.startswith("IMP{") and state]
    return found[0] if found else ("", {})


class Loaders(pl.LightningDataModule):
    """The training or validation batches of a datamodule as what is validated; the datamodule is set up once."""

    def __init__(self, data: pl.LightningDataModule) -> None:
        super().__init__()
        self.data, self.part, self.is_set_up = data, "val", False

    def prepare_data(self) -> None:
        """The datamodule's."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """The datamodule's, for fit."""
        self.data.trainer = self.trainer
        if not self.is_set_up:
            self.data.setup("fit")
            self.is_set_up = True

    def val_dataloader(self) -> Any:
        """The loader of the part that is meant."""
        return self.data.train_dataloader() if self.part == "train" else self.data.val_dataloader()


class Recalibrate(pl.Callback):
    """Turns a validation over training batches into a measurement of all batch norms' statistics."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training mode, statistics from nothing."""
        self.inside = recalibrating(pl_module)
        self.inside.__enter__()
        pl_module.train()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Statistics as measured."""
        self.inside.__exit__(None, None, None)


class Logits(pl.Callback):
    """Keeps logits and labels of a classifier's validation; ``why`` says why there are none."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.why = ""

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        """One more forward pass."""
        if self.why:
            return
        try:
            require_logits(pl_module, "forward", "the prediction ensemble")
            inputs, labels = inputs_and_labels(batch)
            self.logits.append(logits_of(pl_module, "forward", inputs).float().cpu())
            self.labels.append(labels.cpu())
        except (TypeError, ValueError) as error:
            self.why = str(error)


class Kitchen:
    """Scores and averages models of one config.

    Args:
        config: The soup's ``config.yaml``.
        settings: ``metric``, ``lower``, ``bn_fraction``, ``vary``, ``soup`` of the manifest.
    """

    def __init__(self, config: Path, settings: Mapping[str, Any]) -> None:
        with quiet("lightning.pytorch", "lightning.fabric"):
            cli, _ = planned(["fit", "--config", str(config)])
            self.config = cli.config["fit"]
            self.settings = settings
            data = cli.built("data", self.config.data)
            if hasattr(data, "check_root"):
                data.check_root("fit")
            self.loaders = Loaders(data)
            self.module: pl.LightningModule = cli.built("model", self.config.model)
            if is_overridden("configure_model", self.module, pl.LightningModule):
                self.module.configure_model()
        self.imp = next(one.init_args for one in self.config.trainer.callbacks if one.class_path.rpartition(".")[2] == "IMP")
        if not is_overridden("validation_step", self.module, pl.LightningModule):
            raise CommandError(
                f"{type(self.module).__name__} has no validation_step, which scores candidates: give it one that logs a metric"
            )

    # ---- scoring -----------------------------------------------------------------------------------------------------------------------

    def _validate(self, part: str, callback: pl.Callback, limit: int | float = 1.0) -> Mapping[str, Any]:
        """The metrics of a validation of the module as it is, over a part of the data; random numbers are the same each time."""
        trainer_config = self.config.trainer
        pl.seed_everything(0, verbose=False)
        self.loaders.part = part
        with quiet("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*val_dataloader")  # shuffled, or few workers
            trainer = pl.Trainer(
                accelerator=trainer_config.accelerator,
                devices=1,
                precision=trainer_config.precision,
                callbacks=[callback],
                limit_val_batches=limit,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                inference_mode=False,
            )
            trainer.validate(self.module, datamodule=self.loaders, verbose=False)
        return trainer.callback_metrics

    def score(self, state: Mapping[str, Tensor]) -> tuple[float, Logits]:
        """The metric of a model whose batch norms are recalibrated first, the higher the better, and its logits.

        Raises:
            CommandError: The metric isn't logged, or isn't finite.
        """
        self.module.load_state_dict(names_in(self.module, dict(state)))
        if batch_norms(self.module):
            limit = self.config.trainer.limit_train_batches
            self._validate("train", Recalibrate(), max(1, math.ceil(self.settings["bn_fraction"] * self._train_batches(limit))))
        logits = Logits()
        limit = self.config.trainer.limit_val_batches
        metrics = self._validate("val", logits, 1.0 if limit is None else limit)
        name = self.settings["metric"]
        if name not in metrics:
            logged = sorted(metrics)
            why = why_missing(name, logged, "validate", {})
            raise CommandError(f"--metric {name}: no such validation metric; logged were: {', '.join(logged) or 'none'}\n  {why}")
        value = float(metrics[name])
        if not math.isfinite(value):
            raise CommandError(f"{name} is {value}: the run has diverged; lower its learning rate (IMP's peak)", exit_code=1)
        return (-value if self.settings["lower"] else value), logits

    def _train_batches(self, limit: int | float | None) -> int:
        """Batches of an epoch, as the config limits them."""
        if not self.loaders.is_set_up:
            self.loaders.prepare_data()
            self.loaders.data.setup("fit")
            self.loaders.is_set_up = True
        try:
            batches = len(self.loaders.data.train_dataloader())
        except TypeError as error:
            raise CommandError(f"batch norms can't be recalibrated on a share of a training loader without a length: {error}") from error
        return batches if limit is None else min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    # ---- averaging ---------------------------------------------------------------------------------------------------------------------

    def mix(self, files: Mapping[str, Path], kind: str, out: Path) -> dict[str, Any]:
        """Score models and average them into a checkpoint, which is written last.

        Args:
            files: Name of each model -> its checkpoint.
            kind: ``uniform``, ``greedy`` or ``reprune``.
            out: The file to write.

        Returns:
            ``value``, ``candidates`` (name -> value), ``selected`` (names), ``sparsity``, ``ensemble``, ``agreement`` (null where no
            logits are found), ``diversity``, ``reliability`` (empty without logits).

        Raises:
            CommandError: The models don't belong together: masks, architecture or number of steps differ; or a file can't be read.
        """
        contents = {name: self._content(name, file) for name, file in files.items()}
        masks = {name: {key: mask.bool() for key, mask in _imp_state(content)[1]["masks"].items()} for name, content in contents.items()}
        self._check(contents, masks, kind)
        states: list[State] = [masked_state(plain_names(content["state_dict"]), masks[name]) for name, content in contents.items()]
        names = list(files)
        mask = next(iter(masks.values()))
        scored = [self.score(state) for state in states]
        scores = [score for score, _ in scored]
        chosen = list(range(len(states)))
        if kind == "greedy":
            chosen, _ = greedy_selection(scores, lambda places: self.score(uniform_soup(states[place] for place in places))[0])
        soup = uniform_soup(states[place] for place in chosen)
        if kind == "reprune":
            weights = {name: soup[name] for name in mask}
            everything = {name: torch.ones_like(kept) for name, kept in mask.items()}
            generator = torch.Generator().manual_seed(self.imp.seed)
            mask = pruned_masks(weights, everything, self.imp.sparsity, self.imp.selector, generator)
            soup = masked_state(soup, mask)
        value, logits = self.score(soup)
        measured = plain_names(self.module.state_dict())  # with the recalibrated batch norms
        content = {key: part for key, part in next(iter(contents.values())).items() if key not in _OF_TRAINING}
        key, state = _imp_state(content)
        content["callbacks"] = {key: {**state, "masks": {name: kept.cpu() for name, kept in mask.items()}}}
        content["state_dict"] = {name: measured.get(name, kept).detach().cpu() for name, kept in soup.items()}
        out.parent.mkdir(parents=True, exist_ok=True)
        AtomicCheckpointIO().save_checkpoint(content, out)
        sign = -1.0 if self.settings["lower"] else 1.0
        gone = sum(int((~kept).sum()) for kept in mask.values())
        return {
            "value": sign * value,
            "candidates": {name: sign * score for name, score in zip(names, scores, strict=True)},
            "selected": [names[place] for place in chosen],
            "sparsity": gone / sum(kept.numel() for kept in mask.values()),
            **self._ensemble([one for _, one in scored], logits),
            "reliability": self._reliability(logits),
            "diversity": self._diversity(states),
        }

    def _content(self, name: str, file: Path) -> dict[str, Any]:
        if not file.is_file():
            raise CommandError(f"{name}: its checkpoint {file} is gone: put it back, or delete the run's folder, and it is done again")
        try:
            content = check_readable(file)
        except UnreadableCheckpoint as error:
            raise CommandError(f"{name}: {error}\n  delete the run's folder, and it is done again", exit_code=1) from error
        if not _imp_state(content)[1]:
            raise CommandError(f"{name}: {file} has no masks of IMP: it isn't a run of this soup")
        return content

    def _check(self, contents: Mapping[str, Mapping[str, Any]], masks: Mapping[str, Mapping[str, Tensor]], kind: str) -> None:
        """Raise unless the models can be averaged."""
        first, *others = contents
        for name in others:
            try:
                check_alike(contents[first]["state_dict"], contents[name]["state_dict"], name)
            except ValueError as error:
                raise CommandError(
                    f"{error}\n  candidates of a phase are copies of one model: {first} was made by another config"
                ) from error
            if kind == "reprune":
                continue
            differing = [key for key, mask in masks[first].items() if not torch.equal(mask, masks[name].get(key, ~mask))]
            if differing or set(masks[name]) != set(masks[first]):
                key = differing[0] if differing else sorted(set(masks[name]) ^ set(masks[first]))[0]
                raise CommandError(
                    f"{name} has another mask than {first} ({key}, {len(differing)} weights in all): their average would lose its zeros\n"
                    "  candidates must start from the same pruned model: give IMP dense_epochs or start, unless the module comes trained;"
                    " or delete the folder of the odd one, and it is done again"
                )
            steps = [contents[one].get("global_step") for one in (first, name)]
            if steps[0] != steps[1] and self.settings["vary"] != "retrain_epochs":
                raise CommandError(
                    f"{name} was retrained for {steps[1]} optimiser steps, {first} for {steps[0]}: not the same budget\n"
                    "  delete the folder of the odd one, and it is done again; or vary retrain_epochs on purpose"
                )

    def _diversity(self, states: Sequence[State]) -> dict[str, float]:
        if len(states) < 2:
            return {}
        trained = [name for name in plain_names(dict(self.module.named_parameters())) if name in states[0]]
        vectors = torch.stack([torch.cat([state[name].flatten().float() for name in trained]) for state in states])
        return {name: float(value) for name, value in diversity(vectors).items()}

    @staticmethod
    def _reliability(soup: Logits) -> dict[str, float]:
        """Expected and largest calibration error in 15 bins, and the accuracy of the class that is recognised worst."""
        if soup.why or not soup.logits:
            return {}
        logits, labels = torch.cat(soup.logits), torch.cat(soup.labels)
        classes, chances = logits.shape[1], logits.softmax(dim=1)
        ece, mce = (float(multiclass_calibration_error(chances, labels, classes, n_bins=15, norm=norm)) for norm in ("l1", "max"))
        present = torch.bincount(labels, minlength=classes) > 0
        return {
            "ece": ece,
            "mce": mce,
            "worst_class_accuracy": float(multiclass_accuracy(logits, labels, classes, average=None)[present].min()),
        }

    @staticmethod
    def _ensemble(models: Sequence[Logits], soup: Logits) -> dict[str, float | None]:
        if soup.why or len(models) < 2:
            return {"ensemble": None, "agreement": None}
        labels = torch.cat(soup.labels)
        guess = ensemble_probabilities(torch.stack([torch.cat(model.logits) for model in models])).argmax(1)
        agreement = (guess == torch.cat(soup.logits).argmax(1)).double().mean()
        return {"ensemble": float((guess == labels).double().mean()), "agreement": float(agreement)}
