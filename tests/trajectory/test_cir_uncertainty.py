"""Composed retrieval by a Trainer against the page's loop: two epochs with another gamma and learning rate each."""

import itertools

import pytest
import torch

from lit_methods import ComposedRetrieval, ContentStyleCompositor, EmbeddedWords, ResidualCompositor, SmallMapTrunk, VectorTrunk
from lit_methods.datamodules import ShiftedClassesDataModule
from lit_methods.seeds import seeded_noise
from trajectories import assert_same_logs, assert_same_state, page_loop, run


def parts(kind):
    torch.manual_seed(0)
    if kind == "vectors":
        return VectorTrunk(64, 16, 12), EmbeddedWords(6, 5), ResidualCompositor(12, 5, 16)
    return SmallMapTrunk(1, 8), EmbeddedWords(6, 5), ContentStyleCompositor(8, 5, 2)


@pytest.mark.parametrize(("kind", "dtype"), [("vectors", torch.float64), ("maps", torch.float32)])
def test_a_run_is_the_loop(kind, dtype):
    module = ComposedRetrieval(
        *parts(kind), width=32, gamma_0=2.0, learning_rate=0.1, momentum=0.9, weight_decay=1e-3, warmup_epochs=1, seed=4
    )
    module = module.to(dtype)
    own = [part.to(dtype) for part in parts(kind)]
    torch.manual_seed(7)
    head = torch.nn.Linear(own[0].channels, 32).to(dtype)
    module.head.load_state_dict(head.state_dict())
    data = ShiftedClassesDataModule(pairs_per_epoch=32, batch_size=8, seed=3)
    data.setup("fit")
    batches = [
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in b.items()} for b in data.train_dataloader()
    ]
    logs = run(module, batches, max_epochs=2)

    trunk, words, compositor = own
    parameters = list(itertools.chain(*(part.parameters() for part in (*own, head))))
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: (0.01, 1.0, 1.0)[epoch])

    def draw(step, number, name, like):
        return seeded_noise(f"cir_uncertainty step {step} batch {number} rank 0 {name}", 4, like)

    wanted = page_loop("cir_uncertainty").train(
        lambda reference, ids, mask: head(compositor(trunk(reference), words(ids, mask)).mean(dim=(2, 3))),
        lambda image: head(trunk(image).mean(dim=(2, 3))),
        batches, 2, optimizer, scheduler, draw, gamma_0=2.0,
    )  # fmt: skip
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_same_logs(logs, wanted, tolerance)
    for ours, theirs in ((module.image_encoder, trunk), (module.text_encoder, words), (module.compositor, compositor), (module.head, head)):
        assert_same_state(ours, theirs, tolerance)
    assert len({round(float(log["cir_uncertainty/gamma"]), 6) for log in wanted}) == 2
