"""Distribution alignment: predictions of unlabelled images, corrected so that no class is predicted too often over time.

Source: ReMixMatch (arXiv:1911.09785), section 3.1, in the forms that ShrinkMatch (arXiv:2308.06777) and SimMatchV2 (arXiv:2308.06692) use.
"""

import torch
from torch import Tensor, nn


def align(probability: Tensor, marginal: Tensor) -> Tensor:
    """Rows divided by ``marginal`` and made to sum to 1 again.

    Args:
        probability: (B, C), rows sum to 1.
        marginal: (C,) or (1, C), >= 0: how often each class was predicted, up to a factor.

    Returns:
        (B, C), rows sum to 1. Zeros of the marginal count as its limit from above: a class that nobody predicts stays at 0, one that is
        predicted for the first time takes the row, and a marginal of zeros alone, an empty queue's, changes nothing.
    """
    # the smallest normal number: a row that sums to 1 can't overflow by it
    ratio = probability / marginal.clamp(min=torch.finfo(probability.dtype).tiny)
    return ratio / ratio.sum(dim=1, keepdim=True)


def moving_marginal(marginal: Tensor | None, batch_mean: Tensor, momentum: float = 0.999) -> Tensor:
    """``momentum * marginal + (1 - momentum) * batch_mean``; the batch mean itself where there is no marginal yet."""
    return batch_mean if marginal is None else momentum * marginal + (1 - momentum) * batch_mean


@torch.no_grad()
def advance(average: Tensor, known: Tensor, value: Tensor, momentum: float) -> None:
    """:func:`moving_marginal` in place, where the bool tensor ``known`` says whether there is an average yet; it is True from then on."""
    average.copy_(torch.where(known, moving_marginal(average, value, momentum), value))
    known.fill_(True)


class MarginalQueue(nn.Module):
    """The last L batch means, first in, first out; their mean is the marginal. Saved with the module.

    It starts as zeros, and the mean is always over L slots: the factor that is missing at first goes away in :func:`align`.

    Args:
        length: L >= 1.
        num_classes: C.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, length: int, num_classes: int) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length is {length}: a queue of batch means needs 1 slot or more")
        self.register_buffer("queue", torch.zeros(length, num_classes))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def push(self, batch_mean: Tensor) -> Tensor:
        """Take in a mean (C,) and give back the marginal (C,) in its dtype."""
        self.queue.index_copy_(0, self.pointer, batch_mean.detach().to(self.queue.dtype)[None])
        self.pointer.add_(1).remainder_(len(self.queue))
        return self.queue.mean(dim=0).to(batch_mean.dtype)
