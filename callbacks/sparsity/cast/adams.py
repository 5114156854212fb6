"""AdamS: Adam that shrinks the smallest weights of each N:M group by a decay that grows with time (CAST, arXiv:2509.25996, Alg. 1).

The paper has no public code. The decay of its predecessor AST (arXiv:2407.20584) is here too, as another rule.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_methods import checks

Rule = Literal["adams", "ast"]
_AT_ONCE = {"cpu": 2**16}  # entries that are updated together: what stays in the processor's cache
_AT_ONCE_ELSEWHERE = 2**26


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def decay_share(step: int, total_steps: int) -> float:
    """alpha_t = t / T: the decay's share in the update of a masked weight.

    Args:
        step: t, optimiser steps done before this one, >= 0: the first step has no decay.
        total_steps: T >= 1.

    Returns:
        In [0, 1]; 1 beyond T.
    """
    return min(step / total_steps, 1.0)


def decayed_momentum(exp_avgs: list[Tensor], weights: list[Tensor], masks: list[Tensor], alpha: float, l1_decay: float) -> list[Tensor]:
    """mu~ of Alg. 1: momentum of kept weights; of masked ones (1 - alpha) mu + alpha lambda sign(theta).

    Args:
        exp_avgs: mu, one tensor per weight, of raw gradients; not changed.
        weights: theta before the step, same shapes.
        masks: bool, True for weights that are kept, same shapes.
        alpha: In [0, 1].
        l1_decay: lambda >= 0, of the order of a typical gradient.

    Returns:
        New tensors.
    """
    decayed = torch._foreach_mul(exp_avgs, 1.0 - alpha)
    torch._foreach_add_(decayed, torch._foreach_sign(weights), alpha=alpha * l1_decay)
    return [torch.where(mask, mean, other) for mask, mean, other in zip(masks, exp_avgs, decayed, strict=True)]


def ast_momentum(exp_avgs: list[Tensor], weights: list[Tensor], masks: list[Tensor], alpha: float, l1_decay: float) -> list[Tensor]:
    """The direction of AST: mu + alpha lambda (1 - M) theta.

    Arguments as in :func:`decayed_momentum`, where ``alpha`` is the ramp of lambda.
    """
    decayed = torch._foreach_add(exp_avgs, weights, alpha=alpha * l1_decay)
    return [torch.where(mask, mean, other) for mask, mean, other in zip(masks, exp_avgs, decayed, strict=True)]


@torch.no_grad()
def adam_update_(
    weights: list[Tensor],
    exp_avg_sqs: list[Tensor],
    directions: list[Tensor],
    seen: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Second moments and weights of Adam, in place.

    v = b2 v + (1 - b2) s^2, then theta -= lr d / (1 - b1^(t+1)) / (sqrt(v / (1 - b2^(t+1))) + eps).

    Args:
        weights: theta.
        exp_avg_sqs: v, without bias correction.
        directions: d: the momentum in Adam, mu~ in AdamS.
        seen: s: the gradient in Adam, mu~ in AdamS (for kept weights, too).
        step: t, counted from 0.
        lr: Learning rate of this step.
        betas: b1 and b2.
        eps: Added to the denominator.
    """
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, seen, seen, 1.0 - betas[1])
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1.0 - betas[1] ** (step + 1)) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(weights, directions, denominators, -lr / (1.0 - betas[0] ** (step + 1)))


# ---- the optimiser ---------------------------------------------------------------------------------------------------------------------


class AdamS(Optimizer):
    """Adam with selective, growing decay of the weights that an N:M mask will remove.

    Weights named in ``sparse`` are updated by ``rule``; all others by Adam. Each sparse weight needs a mask from :meth:`set_masks` before
    it is stepped: without one the step raises, for plain Adam in its place would go unnoticed. The momentum holds raw gradients only.
    The :class:`CAST` callback puts this optimiser in the place of Adam or AdamW and keeps its masks.

    Args:
        params: Parameters or groups, as torch's optimisers take them.
        lr: Learning rate.
        betas: b1 and b2, in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled, as in AdamW, of all weights of the group; the method itself has none.
        l1_decay: lambda. In ``adams`` of the order of typical gradients, 4e-7 for LLaMA2-7B; in ``ast`` 6e-5 to 1e-4.
        total_steps: T of alpha = t / T, for ``adams``; saved, and another T can't be loaded into it.
        ramp_steps: For ``ast``: steps over which lambda rises from 0; 0: at once.
        rule: ``adams``, or ``ast``: mu + lambda_t (1 - M) theta.
        sparse: Parameters that have masks, float32 or float64.

    Raises:
        ValueError: A value outside its range, or a sparse weight in half precision, where the decay is lost in rounding.
        RuntimeError: At a step, a sparse weight without an aligned mask, or no ``total_steps``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        l1_decay: float = 4e-7,
        total_steps: int | None = None,
        ramp_steps: int = 0,
        rule: Rule = "adams",
        sparse: Iterable[Tensor] = (),
    ) -> None:
        checks.at_least(0, lr=lr, eps=eps, weight_decay=weight_decay, l1_decay=l1_decay, ramp_steps=ramp_steps)
        checks.at_least(1, "optimiser steps", total_steps=total_steps)
        checks.one_of(Rule, rule=rule)
        checks.betas(betas=betas)
        settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "l1_decay": l1_decay, "total_steps": total_steps, "ramp_steps": ramp_steps})
        self.rule = rule
        self.masks: dict[Tensor, Tensor] = {}
        self.sparse: set[Tensor] = set()
        self.add_sparse(sparse)

    @classmethod
    def from_adam(cls, optimizer: Optimizer, **settings: Any) -> "AdamS":
        """An optimiser with the groups, settings and state of an Adam or AdamW; ``settings`` are further arguments of :class:`AdamS`.

        Raises:
            ValueError: An option of Adam that AdamS hasn't: AMSGrad, ``maximize``, or weight decay that joins the gradient.
        """
        for group in optimizer.param_groups:
            decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
            joined = ["weight_decay of Adam"] if group.get("weight_decay") and not decoupled else []
            if wrong := [name for name in ("amsgrad", "maximize") if group.get(name)] + joined:
                raise ValueError(f"AdamS can't replace {type(optimizer).__name__} with {wrong[0]}: use torch.optim.AdamW without it")
        new = cls(optimizer.param_groups, **settings)
        new.state.update(optimizer.state)
        return new

    def add_sparse(self, parameters: Iterable[Tensor]) -> None:
        """Name parameters that need masks.

        Raises:
            ValueError: One is in half precision, or belongs to no group.
        """
        own = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for parameter in parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                kind = f"a sparse weight of shape {tuple(parameter.shape)} is {parameter.dtype}"
                raise ValueError(f"{kind}: AdamS needs float32 weights, in which its small decay isn't lost; use bf16-mixed or 32-true")
            if id(parameter) not in own:
                raise ValueError(f"a sparse weight of shape {tuple(parameter.shape)} is in none of the groups: give it in params, too")
            self.sparse.add(parameter)

    def set_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Parameter -> bool mask of the kept entries; replaces the masks of these parameters.

        Raises:
            ValueError: A mask doesn't fit its weight, or the weight isn't sparse.
        """
        for parameter, mask in masks.items():
            if parameter not in self.sparse:
                raise ValueError(f"a weight of shape {tuple(parameter.shape)} gets a mask, but isn't among the sparse ones")
            if problem := _misaligned(parameter, mask):
                raise ValueError(f"AdamS.set_masks: {problem}")
        self.masks.update(masks)

    def alpha(self, group: dict[str, Any], step: int) -> float:
        """Share of the decay at step ``step`` (counted from 0): t / T, or the ramp of ``ast``."""
        if self.rule == "ast":
            return 1.0 if group["ramp_steps"] == 0 else decay_share(step, group["ramp_steps"])
        if group["total_steps"] is None:
            raise RuntimeError("AdamS doesn't know how long it trains: give total_steps, the T of alpha = t / T")
        return decay_share(step, group["total_steps"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Raises:
            RuntimeError: A sparse weight has no aligned mask.
        """
        self._opt_called = True  # what schedulers look at; they may have been made for the Adam before
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alphas = []
            for (step, sparse), weights in self._alike(group["params"]).items():
                alpha = self.alpha(group, step) if sparse else 0.0
                for rows in _chunks([self._row(weight, sparse) for weight in weights]):
                    self._update(group, rows, step, alpha)
                for weight in weights:
                    self.state[weight]["step"] += 1
                alphas += [alpha] if sparse else []
            if alphas:
                group["alpha"] = max(alphas)
                group["decay_budget"] = group.get("decay_budget", 0.0) + float(group["lr"]) * group["alpha"]
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # schedulers needn't patch it

    def _alike(self, parameters: list[Tensor]) -> dict[tuple[int, bool], list[Tensor]]:
        """Parameters with a gradient, by the number of their steps and by whether they are sparse."""
        alike: dict[tuple[int, bool], list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError("AdamS doesn't know sparse gradients: use an embedding with sparse=False")
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it waits for no device
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            alike.setdefault((int(state["step"]), parameter in self.sparse), []).append(parameter)
        return alike

    def _row(self, weight: Tensor, sparse: bool) -> tuple[Tensor, ...]:
        """A weight with its gradient, its moments and, if it is sparse, its mask."""
        assert weight.grad is not None
        row = (weight, weight.grad, self.state[weight]["exp_avg"], self.state[weight]["exp_avg_sq"])
        if not sparse:
            return row
        mask = self.masks.get(weight)
        problem = "it has none" if mask is None else _misaligned(weight, mask)
        if mask is None or problem:
            raise RuntimeError(f"AdamS has no aligned mask for a weight of shape {tuple(weight.shape)} ({problem}): call set_masks")
        return (*row, mask)

    def _update(self, group: dict[str, Any], rows: list[tuple[Tensor, ...]], step: int, alpha: float) -> None:
        weights, grads, exp_avgs, exp_avg_sqs, *masks = map(list, zip(*rows, strict=True))
        lr, betas = float(group["lr"]), group["betas"]
        torch._foreach_lerp_(exp_avgs, grads, 1.0 - betas[0])
        directions, seen = exp_avgs, grads
        if masks:
            change = decayed_momentum if self.rule == "adams" else ast_momentum
            directions = seen = change(exp_avgs, weights, masks[0], alpha, group["l1_decay"])
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
        adam_update_(weights, exp_avg_sqs, directions, seen, step=step, lr=lr, betas=betas, eps=group["eps"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments and settings.

        Raises:
            ValueError: They were saved by a training of another length, and alpha would jump.
        """
        for own, other in zip(self.param_groups, state_dict["param_groups"], strict=False):
            mine, saved = own["total_steps"], other.get("total_steps")
            if None not in (mine, saved) and mine != saved:
                raise ValueError(f"AdamS: total_steps was {saved} and is {mine}, so that alpha = t / T would jump: train as long as before")
        super().load_state_dict(state_dict)


def _chunks(rows: list[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
    """Rows of tensors of one shape in lists of a bounded size: an update needs three more tensors of the size of all that it sees at once.

    On the CPU large tensors are cut, too, where all of a row lie in one piece.
    """
    chunks: list[list[tuple[Tensor, ...]]] = [[]]
    for row in rows:
        limit = _AT_ONCE.get(row[0].device.type, _AT_ONCE_ELSEWHERE)
        cut = row[0].device.type in _AT_ONCE and row[0].numel() > limit and all(tensor.is_contiguous() for tensor in row)
        for piece in zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True) if cut else [row]:
            if chunks[-1] and sum(other[0].numel() for other in chunks[-1]) + piece[0].numel() > limit:
                chunks.append([])
            chunks[-1].append(piece)
    return chunks


def _misaligned(weight: Tensor, mask: Tensor) -> str:
    """What is wrong with a mask; "" for nothing."""
    if mask.shape == weight.shape and mask.dtype == torch.bool and mask.device == weight.device:
        return ""
    there = f"the mask is {tuple(mask.shape)} {mask.dtype} on {mask.device}, the weight {tuple(weight.shape)} on {weight.device}"
    return f"{there}; expected a bool tensor of the same shape on the same device"


__all__ = ["AdamS", "adam_update_", "ast_momentum", "decay_share", "decayed_momentum"]
