"""The variants of the supervised-dictionary paper in the kit: raw TopK, attribution, gated and resampling, against plain loops."""

import pytest
import torch
from torch.utils.data import DataLoader

from helpers import tiny_trainer
from lit_methods import SparseAutoencoder
from lit_methods.sparse_autoencoders.activations import attribution, raw_topk, unexplained_attribution
from lit_methods.sparse_autoencoders.dead import resampled_rows


def test_raw_topk_keeps_negative_entries():
    assert raw_topk(torch.tensor([[-3.0, -1.0, -2.0], [4.0, -5.0, 0.5]]), 2).dense().tolist() == [[0, -1, -2], [4, 0, 0.5]]
    assert raw_topk(torch.tensor([[-3.0, -1.0]]), 5).dense().tolist() == [[-3, -1]]


def test_attribution_sample_by_sample():
    code, decoder, gradient, x = torch.rand(4, 5), torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3)
    reconstruction = code @ decoder
    sparse = sum(abs(float(code[n, j] * gradient[n].dot(decoder[j]))) for n in range(4) for j in range(5)) / 4
    missing = sum(abs(float((x[n] - reconstruction[n]).dot(gradient[n]))) for n in range(4)) / 4
    assert float(attribution(code, decoder, gradient)) == pytest.approx(sparse, rel=1e-5)
    assert float(unexplained_attribution(code, x, reconstruction, gradient)) == pytest.approx(missing, rel=1e-5)


def test_the_gradient_comes_from_the_batch():
    penalties = {"l1": 0.1, "attribution": 0.5, "unexplained_attribution": 0.25}
    module = SparseAutoencoder(3, 8, activation="relu", penalties=penalties, loss="sum", aux_coeff=0.0)
    batch = {"activation": torch.randn(4, 3), "gradient": torch.randn(4, 3)}
    found = module.losses(batch)
    z, x = module.encode(batch["activation"]), batch["activation"]
    error = (x - module.decode(z)).square().sum(1).mean() + 0.1 * z.sum(1).mean()
    more = 0.5 * attribution(z, module.decoder, batch["gradient"])
    more = more + 0.25 * unexplained_attribution(z, x, module.decode(z), batch["gradient"])
    torch.testing.assert_close(found.loss, error + more)
    with pytest.raises(ValueError, match="attribution needs gradient"):
        module.losses({"activation": x})


def test_a_gated_step_is_the_papers():
    module = SparseAutoencoder(3, 6, activation="gated", penalties={"gate_l1": 0.3, "gate_reconstruction": 1.0}, loss="sum", aux_coeff=0.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(5, 3)
    projection = (x - module.decoder_bias) @ module.encoder.T
    gate = projection + module.encoder_bias
    features = (gate > 0) * (projection * module.learned["log_scale"].exp() + module.learned["magnitude_bias"])
    through_gate = gate.relu() @ module.decoder.detach() + module.decoder_bias.detach()
    loss = (features @ module.decoder + module.decoder_bias - x).square().sum(1).mean()
    loss = loss + 0.3 * gate.relu().sum(1).mean() + (through_gate - x).square().sum(1).mean()
    torch.testing.assert_close(module.losses({"activation": x}).loss, loss)
    torch.testing.assert_close(module.encode(x), features)


def test_resampled_rows_are_badly_reconstructed_examples():
    dead, encoder, x = torch.tensor([True, False, True]), torch.randn(3, 4), torch.randn(6, 4)
    losses = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    decoder_rows, encoder_rows = resampled_rows(dead, encoder, x, losses)
    torch.testing.assert_close(decoder_rows[0], x[2] / x[2].norm())
    torch.testing.assert_close(encoder_rows[2], 0.2 * encoder[1].norm() * x[2] / x[2].norm())


def test_the_schedule_rises_again_behind_a_resampling():
    module = SparseAutoencoder(3, 8, activation="relu", resample_at=[2], resample_warmup=4, learning_rate=0.1, aux_coeff=0.0)
    rates: list[float] = []
    step = module.training_step

    def watched(batch, batch_idx):
        rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
        return step(batch, batch_idx)

    module.training_step = watched
    tiny_trainer(max_steps=7, limit_val_batches=0).fit(module, DataLoader(torch.randn(28, 3), batch_size=4))
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.0325, 0.055, 0.0775, 0.1])
