"""The sparse retriever by a Trainer against the page's loop: each mode and loss, past the end of the ramp."""

import pytest
import torch

from lit_methods import DenseRetriever, RetrieverTeacher, SmallTextEncoder, SparseRetriever
from lit_methods.datamodules import SynonymSearchDataModule
from trajectories import assert_same_logs, assert_same_state, page_loop, run


def network(seed):
    torch.manual_seed(seed)
    return SmallTextEncoder(400, width=8, heads=2)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("info_nce", {"idf_mode": "match"}),
        ("info_nce", {"idf_mode": "penalty", "double_log": True, "l0_threshold": 180}),
        ("kl", {"idf_mode": "none", "query_weight": 2.0}),
    ],
)
def test_a_run_is_the_loop(loss, options):
    teachers = [DenseRetriever(network(1)), DenseRetriever(network(2), pooling="cls")] if loss == "kl" else []
    shared = {"flops_weight": 0.05, "ramp_steps": 3, **options}
    module = SparseRetriever(
        network(0), loss=loss, teachers=[RetrieverTeacher(teacher) for teacher in teachers], learning_rate=1e-2, weight_decay=0.1, **shared
    )
    data = SynonymSearchDataModule(num_documents=60, docs_per_query=2, batch_size=8, seed=3)
    logs = run(module, data, max_epochs=1)

    own, batches = network(0), list(data.train_dataloader())
    assert len(batches) == 5
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2, weight_decay=0.1)
    encoders = [teacher.represent for teacher in teachers]
    wanted = page_loop("sparse_retriever").train(own, batches, optimizer, data.idf, loss=loss, teachers=encoders, **shared)
    assert_same_logs(logs, wanted, 1e-5)
    assert_same_state(module.network, own, 1e-6)
    assert len({float(log["retriever/lambda"]) for log in wanted}) == 3
