"""One process is the reference for two."""

import pytest
import torch
from torch import Tensor, nn

from helpers import run_two_processes
from lit_methods import distributed

ROWS = (5, 3)  # of rank 0 and 1


def data(dtype: torch.dtype) -> Tensor:
    return torch.randn(sum(ROWS), 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def network(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 4).to(dtype)


def pair_loss(features: Tensor) -> Tensor:
    """Depends on all pairs of rows, so that a wrong or missing gradient of other ranks' rows shows."""
    similarity = features @ features.T
    return torch.logsumexp(similarity, dim=1).mean() + similarity.square().mean()


def my_rows(x: Tensor, rank: int) -> Tensor:
    return x[sum(ROWS[:rank]) : sum(ROWS[: rank + 1])]


def gradient_under_ddp(dtype: torch.dtype, own_rows_only: bool) -> tuple[Tensor, Tensor]:
    rank = distributed.rank()
    model = nn.parallel.DistributedDataParallel(network(dtype))
    features = model(my_rows(data(dtype), rank))
    everyone = distributed.gather_rows(features)
    if own_rows_only:  # each rank scores its own rows against all; the counts weigh the mean over ranks as one process does
        similarity = features @ everyone.T
        loss = torch.logsumexp(similarity, dim=1).sum() * 2 / sum(ROWS)
    else:
        loss = pair_loss(everyone)
    loss.backward()
    return everyone.detach(), model.module.weight.grad


@pytest.mark.parametrize("own_rows_only", [False, True])
def test_gradient_of_two_ranks_equals_one(own_rows_only: bool) -> None:
    dtype = torch.float64
    model = network(dtype)
    features = model(data(dtype))
    loss = torch.logsumexp(features @ features.T, dim=1).mean() if own_rows_only else pair_loss(features)
    loss.backward()
    for everyone, grad in run_two_processes(gradient_under_ddp, dtype, own_rows_only):
        torch.testing.assert_close(everyone, features.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, model.weight.grad, rtol=1e-12, atol=1e-12)


def gather_many() -> dict[str, Tensor]:
    rank = distributed.rank()
    gathered = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
        x = (torch.arange(ROWS[rank] * 6).reshape(ROWS[rank], 2, 3) + 100 * rank).to(dtype)
        gathered[str(dtype)] = distributed.gather_rows(x)
    gathered["flat"] = distributed.gather_rows(torch.full((rank + 1,), float(rank)))
    gathered["rank 0 has none"] = distributed.gather_rows(torch.full((2 * rank, 3), float(rank)))
    gathered["nobody has any"] = distributed.gather_rows(torch.zeros(0, 3))
    gathered["sum"] = distributed.sum_over_ranks(torch.tensor([[1, 2], [3, 4]]) * 10**rank)
    gathered["strided"] = distributed.gather_rows(torch.arange(6.0).reshape(2, 3).T + rank)
    half = torch.full((2, 3), 0.5 + rank, dtype=torch.bfloat16, requires_grad=True)
    distributed.gather_rows(half).square().sum().backward()
    gathered["bf16 gradient"] = half.grad
    gathered["constant"] = torch.tensor(distributed.gather_rows(half, with_grad=False).requires_grad)
    return gathered


def test_dtypes_shapes_and_unequal_rows() -> None:
    first, second = run_two_processes(gather_many)
    for name in set(first) - {"bf16 gradient"}:
        assert torch.equal(first[name], second[name]), name
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
        parts = [(torch.arange(n * 6).reshape(n, 2, 3) + 100 * r).to(dtype) for r, n in enumerate(ROWS)]
        assert first[str(dtype)].dtype == dtype
        assert torch.equal(first[str(dtype)], torch.cat(parts))
    assert first["flat"].tolist() == [0.0, 1.0, 1.0]
    assert first["rank 0 has none"].tolist() == [[1.0] * 3] * 2
    assert first["nobody has any"].shape == (0, 3)
    assert first["sum"].tolist() == [[11, 22], [33, 44]]
    assert first["strided"].tolist() == [[0, 3], [1, 4], [2, 5], [1, 4], [2, 5], [3, 6]]
    assert not first["constant"]
    assert second["bf16 gradient"].dtype == torch.bfloat16
    assert (second["bf16 gradient"] == 6).all()  # 2 ranks x d/dx x^2 at 1.5; DDP halves it again


def compare_and_broadcast() -> list[object]:
    rank = distributed.rank()
    before = torch.get_rng_state()
    seed = distributed.broadcast_seed()
    answers: list[object] = [
        distributed.world_size(),
        rank,
        distributed.same_on_all_ranks(torch.arange(5.0)),
        distributed.same_on_all_ranks(torch.arange(5.0) + 1e-7 * rank),
        distributed.same_on_all_ranks(torch.zeros(2, 3 - rank, 1 + rank)),  # 6 zeros on rank 0, 8 on rank 1
        distributed.same_on_all_ranks(torch.zeros(2, dtype=torch.int32 if rank else torch.float32)),
        distributed.same_on_all_ranks(torch.zeros(0)),
        distributed.same_on_all_ranks(torch.ones((), dtype=torch.bfloat16)),
        distributed.broadcast_seed(100 + rank),
        torch.equal(before, torch.get_rng_state()),
    ]
    return [*answers, seed]


def test_equality_and_seed() -> None:
    first, second = run_two_processes(compare_and_broadcast)
    assert first[:2] == [2, 0]
    assert second[:2] == [2, 1]
    for answers in (first, second):
        assert answers[2:8] == [True, False, False, False, True, True]
        assert answers[8:10] == [100, True]
    assert first[10] == second[10]
    assert 0 <= first[10] < 2**63


def test_alone_nothing_is_sent() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather_rows(x) is x
    assert not distributed.gather_rows(x, with_grad=False).requires_grad
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.same_on_all_ranks(x)
    assert distributed.broadcast_seed(7) == 7
    assert distributed.broadcast_seed() != distributed.broadcast_seed()


def test_a_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reshape\(1\)"):
        distributed.gather_rows(torch.tensor(1.0))


def fails_on_rank_1() -> int:
    if distributed.rank() == 1:
        raise ArithmeticError("the reason")
    torch.distributed.barrier()
    return 1


def test_the_helper_shows_the_childs_error_and_recovers() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of fails_on_rank_1.*ArithmeticError: the reason"):
        run_two_processes(fails_on_rank_1)
    assert run_two_processes(distributed.rank) == [0, 1]
