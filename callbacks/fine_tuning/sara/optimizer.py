"""AdamW that moves the entries of a mask and no other, with moments for these alone."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.fine_tuning.sara import core


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW on chosen entries of each parameter: the others keep their bits, and have no moments.

    Masks are set by :meth:`set_mask`; a parameter without one is trained whole. Making a mask smaller keeps the moments of what stays.
    Step counts of parameters start when they are first stepped.

    Saves: masks, as positions, and moments in ``state_dict``.

    Refuses: sparse gradients.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Addend to the denominator.
        weight_decay: Decoupled weight decay, of the entries in the mask.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        checks.at_least(0, lr=lr, eps=eps, weight_decay=weight_decay)
        checks.betas(betas=betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def can_replace(old: torch.optim.Optimizer) -> bool:
        """Whether an optimiser is AdamW, or Adam without decay, and has no option that this one lacks."""
        options = ("amsgrad", "maximize") if type(old) is torch.optim.AdamW else ("amsgrad", "maximize", "weight_decay")
        known = type(old) in (torch.optim.Adam, torch.optim.AdamW)
        return known and not any(group.get(option) for group in old.param_groups for option in options)

    @classmethod
    def from_adam(cls, old: torch.optim.Optimizer) -> "MaskedAdamW":
        """One with the groups of another AdamW, with all of their keys, and its state."""
        new = cls(old.param_groups)
        new.state.update(old.state)
        return new

    @torch.no_grad()
    def set_mask(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Train the entries of a mask from now on.

        Args:
            parameter: One of this optimiser's.
            mask: Bool, its shape. Once it was stepped, the mask must lie inside the one before.

        Raises:
            ValueError: Another shape, or a mask with entries that have no moments.
        """
        if mask.shape != parameter.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask is {mask.dtype} {tuple(mask.shape)}: give a bool mask of the parameter's shape {tuple(parameter.shape)}"
            )
        state, flat = self.state[parameter], mask.flatten().to(parameter.device)
        index = flat.nonzero().flatten()
        if "exp_avg" in state:
            before = state.get("index")
            kept = index if before is None else flat[before].nonzero().flatten()
            if len(kept) < len(index):
                raise ValueError(f"{len(index) - len(kept)} entries of the mask have no moments: it must lie inside the one before")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].flatten().index_select(0, kept)
        state["index"] = index

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = group["lr"], group["betas"], group["eps"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ValueError("MaskedAdamW needs dense gradients: set sparse=False in the embedding")
                state = self.state[parameter]
                index = state.get("index")
                values, grad = parameter, parameter.grad
                if index is not None:
                    values, grad = (tensor.flatten().index_select(0, index) for tensor in (parameter, grad))
                if "exp_avg" not in state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(values), exp_avg_sq=torch.zeros_like(values))
                state["step"] += 1
                core.adamw_(values, grad.to(values.dtype), state["exp_avg"], state["exp_avg_sq"], float(state["step"]), *options)
                if index is not None:
                    core.scatter_(values, parameter.data, index)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; positions stay whole numbers, which torch would turn into the parameters' type."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                index = state_dict["state"].get(key, {}).get("index")
                if index is not None:
                    self.state[parameter]["index"] = index.to(parameter.device, copy=True)


__all__ = ["MaskedAdamW"]
