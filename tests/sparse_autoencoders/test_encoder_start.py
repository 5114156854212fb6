"""Where the encoder begins."""

import pytest
import torch

from lit_methods import SparseAutoencoder


def test_the_encoder_begins_as_the_decoder_or_as_it_is_drawn():
    drawn, same = (SparseAutoencoder(8, 64, activation="relu", encoder_start=start) for start in ("kaiming", "decoder"))
    assert same.encoder.equal(same.decoder)
    assert same.encoder is not same.decoder
    assert float(drawn.encoder.norm(dim=1).mean()) == pytest.approx((2 * 8 / 64) ** 0.5, rel=0.1)
    torch.testing.assert_close(torch.nn.functional.normalize(drawn.encoder, dim=1), drawn.decoder.detach())
    with pytest.raises(ValueError, match="encoder_start"):
        SparseAutoencoder(8, 64, activation="relu", encoder_start="random")
