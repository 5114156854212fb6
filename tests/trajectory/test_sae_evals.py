"""SparseAutoencoder with SupervisedDictionaryEval by a Trainer against the page's loop: weights, losses, and the figures at the end."""

import pytest
import torch

from lit_methods import SparseAutoencoder
from lit_methods.callbacks import SupervisedDictionaryEval
from lit_methods.datamodules import AttributeSumsDataModule
from trajectories import TOLERANCE, assert_same_logs, both_dtypes, page_loop, run

SIZES = {"io": 4, "s": 4, "pos": 2}


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_and_its_figures_are_the_loop(dtype):
    torch.manual_seed(0)
    options = {"activation": "relu", "penalties": {"l1": 0.2}, "loss": "sum", "renormalize": "after", "aux_coeff": 0.0}
    module = SparseAutoencoder(16, 40, **options, encoder_start="decoder", learning_rate=1e-2).to(dtype)
    data = AttributeSumsDataModule(width=16, names=4, num_train=96, num_val=80, batch_size=32)
    data.setup("fit")
    for part in (data.train_set, data.val_set):
        part.tensors["activation"] = part.tensors["activation"].to(dtype)
    weights = [one.detach().clone().requires_grad_() for one in (module.encoder, module.encoder_bias, module.decoder, module.decoder_bias)]
    loader = data.train_dataloader()
    batches = list(loader)
    callback = SupervisedDictionaryEval(["io", "s", "pos"], k_edits=[2], threshold=0.3, monitored="io/greedy_2")
    logs = run(module, data, [callback], limit_val_batches=1.0)

    loop = page_loop("sae_evals")
    optimizer = torch.optim.Adam(weights, lr=1e-2, betas=(0.9, 0.99))
    wanted = loop.train(*weights, optimizer, batches, 0.2)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    for ours, theirs in zip((module.encoder, module.encoder_bias, module.decoder, module.decoder_bias), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    rows = data.val_set.tensors
    rows = {name: value[rows["activation"][:, 0].argsort(stable=True)] for name, value in rows.items()}  # pairs follow the order
    found = module.trainer.callback_metrics
    judged = (module.encode, module.decoder.detach(), module.decoder_bias.detach(), data.train_set.tensors, rows, SIZES)
    for attribute in SIZES:
        for name, value in loop.judge(*judged, attribute, 2, threshold=0.3).items():
            if attribute != "io" and name.startswith("weight/"):  # logged of the monitored attribute alone
                continue
            ours = found[f"sae_evals/val_{name}"].double()
            torch.testing.assert_close(ours, torch.as_tensor(value).double(), rtol=1e-4, atol=1e-5, msg=name)
    assert found["sae_evals/val_features/io"] > 0
    assert found["sae_evals/val_distance/io/supervised"] < found["sae_evals/val_distance/io/greedy_2"]
