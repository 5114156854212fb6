"""DSL on LightGCN by a Trainer against the page's loop: the first mask, Adam over dead entries, updates of the mask."""

import copy

import pytest
import torch

from lit_methods import LightGCN
from lit_methods.callbacks import DSL
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

USERS, ITEMS = 7, 9


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    edges = (torch.rand(USERS, ITEMS, generator=generator) < 0.4).nonzero().T
    batches = [
        {
            "user": torch.randint(USERS, (6,), generator=generator),
            "positive": torch.randint(ITEMS, (6,), generator=generator),
            "negative": torch.randint(ITEMS, (6,), generator=generator),
        }
        for _ in range(7)
    ]
    torch.manual_seed(0)
    module = LightGCN(USERS, ITEMS, embedding_dim=5, num_layers=2, reg_weight=1e-2, learning_rate=0.05, min_lr=None).to(dtype)
    module.set_graph(*edges)
    table = torch.nn.Parameter(copy.deepcopy(module.embedding.weight.data))
    logs = run(module, batches, [DSL(density=0.4, interval=2, targets=["embedding"])])

    optimizer = torch.optim.Adam([table], lr=0.05)
    draws = torch.Generator().manual_seed(own_seed("DSL", 0))
    loop = page_loop("dsl_recommendation")
    wanted = loop.train(table, edges, (USERS, ITEMS), optimizer, batches, draws, 0.4, interval=2, layers=2, reg_weight=1e-2)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module, {"embedding.weight": table}, TOLERANCE[dtype])
    assert 0 < (table == 0).sum() < table.numel()
