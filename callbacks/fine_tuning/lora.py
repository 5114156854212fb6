"""LoRA, which the techniques of this folder are compared with: the adapters are those of the library peft."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.targets import refuse_lazy, refuse_sharded, select_modules

_NAME = "default"  # what peft calls the one adapter
_AVERAGES = "it makes its copy of the module before the adapters are there: average with EMATeacher"


class LoRA(OrderedCallback):
    """Trains low-rank adapters beside chosen linear layers, W + (alpha / r) B A, and nothing else of a module.

    Runs: peft puts the adapters on in ``setup``, or behind the module's own ``setup`` and ``configure_model`` where it has them, before
    the optimisers are made; everything else is frozen while fit runs. After fit the adapters are merged into the weights.

    Saves: under the weights' own names the merged ones, so that checkpoints load and export without the callback; adapters, and the
    weights below them, in the callback's state.

    Refuses: strategies that shard weights, ``ModelPruning``, Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging``, callbacks
    of sparse fine-tuning and of sparsity, lazy layers.

    Args:
        targets: ``fnmatch`` patterns on names of layers that get an adapter, such as ``*.q_proj``.
        rank: r.
        alpha: Scale of the adapters; null: r, so that the factor is 1.
        dropout: Share of the adapters' inputs that is dropped in training.

    Raises:
        ValueError: An argument outside its range; in ``setup``, a pattern that matches nothing.
        ImportError: peft is missing.
    """

    runs_before: ClassVar[Sequence[str]] = ("SparsityReport", "Dashboard")
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "ModelPruning": "both replace the weights while fit runs",
        "SubsetCallback": "each freezes what the other one trains",
        "SparsityCallback": "its weights are frozen",
        **dict.fromkeys(("WeightAveraging", "StochasticWeightAveraging"), _AVERAGES),
    }

    def __init__(self, targets: Sequence[str], rank: int = 16, alpha: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        checks.patterns(targets=targets)
        checks.at_least(1, "a whole number", rank=rank)
        checks.positive(alpha=alpha)
        checks.within("[0, 1)", "a share of the inputs", dropout=dropout)
        if not targets:
            raise ValueError("targets is empty: name the layers that get an adapter, such as ['*.q_proj', '*.v_proj']")
        self.targets, self.rank, self.alpha, self.dropout = list(targets), rank, alpha, dropout
        self._adapted: dict[str, Any] = {}  # name -> peft's layer, while fit runs
        self._thawed: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._marks: set[str] = set()
        self._left: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the adapters on.

        Raises:
            ValueError: A strategy that shards weights, or a pattern that matches nothing.
            ImportError: peft is missing.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, "LoRA")
        self.leave(trainer, pl_module)
        self.when_built(pl_module, lambda: self._begin(pl_module))

    def _begin(self, pl_module: pl.LightningModule) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError('LoRA needs peft: pip install "lit-methods[peft]"') from error
        with checks.naming("LoRA"):
            refuse_lazy(pl_module, "LoRA")
            names = list(select_modules(pl_module, self.targets))
        self._thawed = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha or self.rank, lora_dropout=self.dropout, target_modules=names)  # type: ignore[arg-type]
        before = set(vars(pl_module))
        inject_adapter_in_model(config, pl_module)
        self._marks = set(vars(pl_module)) - before  # what peft notes on the module
        modules = dict(pl_module.named_modules())
        self._adapted = {name: modules[name] for name in names}
        self._handles = [
            pl_module.register_state_dict_post_hook(lambda *given: self._merged_on_save(*given)),  # torch marks the function
            pl_module.register_load_state_dict_pre_hook(self._plain_on_load),
        ]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is trained."""
        count = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        rank_zero_info(f"LoRA trains {count:,} values, in {len(self._adapted)} layers")

    def _merged_on_save(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name, layer in self._adapted.items():
            for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
                del state[key]
            with torch.no_grad():
                base = layer.get_base_layer()
                state[f"{prefix}{name}.weight"] = base.weight.detach() + layer.get_delta_weight(_NAME).to(base.weight.dtype)
                if base.bias is not None:
                    state[f"{prefix}{name}.bias"] = base.bias.detach()

    def _plain_on_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, layer in self._adapted.items():
            for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
                state[f"{prefix}{name}.base_layer.{key.removeprefix(f'{prefix}{name}.')}"] = state.pop(key)
            for key, value in layer.state_dict().items():
                if "lora_" in key:  # A as it was drawn, B = 0: nothing is learned on top of what is loaded
                    state[f"{prefix}{name}.{key}"] = torch.zeros_like(value) if "lora_B" in key else value

    def state_dict(self) -> dict[str, Any]:
        """Adapters, and the weights below them."""
        if not self._adapted:
            return self._left
        return {"layers": {name: dict(layer.state_dict()) for name, layer in self._adapted.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over adapters: the module has loaded the merged weights just before.

        Raises:
            ValueError: The checkpoint's adapters are of other layers, or of another rank.
        """
        if not state or not self._adapted:
            return
        shapes = {name: {key: value.shape for key, value in layer.state_dict().items()} for name, layer in self._adapted.items()}
        if shapes != {name: {key: value.shape for key, value in saved.items()} for name, saved in state["layers"].items()}:
            raise ValueError("LoRA: the checkpoint's adapters are others: resume with the same module, targets and rank")
        for name, layer in self._adapted.items():
            layer.load_state_dict(state["layers"][name])

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge, and leave an ordinary module."""
        if not self._adapted:
            return
        self._left = apply_to_collection(self.state_dict(), Tensor, lambda value: value.detach().cpu().clone())
        for handle in self._handles:
            handle.remove()
        for name, layer in self._adapted.items():
            with torch.no_grad():
                base = layer.get_base_layer()
                base.weight.data = base.weight.detach() + layer.get_delta_weight(_NAME).to(base.weight.dtype)
            owner, _, attribute = name.rpartition(".")
            setattr(pl_module.get_submodule(owner), attribute, base)
        for mark in self._marks:
            vars(pl_module).pop(mark, None)
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        self._adapted, self._thawed, self._handles = {}, [], []


__all__ = ["LoRA"]
