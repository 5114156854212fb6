"""A model that is used and never trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a module that always evaluates, never learns and is never saved: a teacher, an encoder, a perceptual loss.

    The module is kept out of registration. So the parent's ``parameters()``, ``state_dict()``, ``train()``,
    ``requires_grad_()`` and ``apply()`` don't reach it, no optimiser and no checkpoint gets it, DDP neither wraps nor
    broadcasts it. It still follows ``.to()``, ``.half()`` and Lightning's device moves, and is copied and pickled
    with its parent. Being unsaved, it must be rebuilt with the same weights before a resume.

    Args:
        module: Is put into eval mode, and its parameters lose ``requires_grad``, in place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["_hidden"] = module.eval().requires_grad_(False)  # past nn.Module.__setattr__, which would register it

    @property
    def module(self) -> nn.Module:
        """The module itself. Calls that go past :meth:`forward` let gradients through to their inputs."""
        return self.__dict__["_hidden"]  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, computed without gradients; ordinary tensors that autograd may use further on."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        super()._apply(fn, recurse)
        if recurse:
            self.module._apply(fn)
        return self

    def extra_repr(self) -> str:
        """Class and size of what is inside."""
        return f"{type(self.module).__name__}, {sum(p.numel() for p in self.module.parameters()):,} parameters"
