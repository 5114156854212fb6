"""sae-lens itself: what we save it loads, what it saves we load, and codes and reconstructions are those of the other.

pip install "lit-methods[peers]"
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_methods import SparseAutoencoder
from lit_methods.sparse_autoencoders.saelens import load_saelens, save_saelens

sae_lens = pytest.importorskip("sae_lens", reason='sae-lens is not installed: pip install "lit-methods[peers]"')
pytestmark = pytest.mark.slow

WIDTH, FEATURES = 12, 40
OURS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "tied, not centred": {"activation": "relu", "tied": True, "centre": False},
    "topk": {"settings": {"k": 5}},
    "topk of all": {"settings": {"k": FEATURES}},
    "topk with a bias, a scale, a norm": {"settings": {"k": 5}, "encoder_bias": "learned", "output_scale": 1.0, "normalize": "norm_sqrt"},
    "topk of samples that are standardised": {"settings": {"k": 5}, "normalize": "sample"},
    "abstopk": {"activation": "abstopk", "settings": {"k": 5}},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated", "settings": {"rectified": True}},
    "gba": {"activation": "gba", "settings": {"jump": False}},
    "gba with jumps": {"activation": "gba"},
}
THEIRS: dict[str, dict[str, Any]] = {
    "standard": {},
    "topk": {"k": 5},
    "topk, rescaled": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 5},
    "abstopk, rescaled, layer_norm": {"k": 5, "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"},
    "jumprelu": {},
    "gated": {},
    "gated, not centred": {"apply_b_dec_to_input": False},
}
CLASSES = {
    "standard": sae_lens.StandardSAE,
    "topk": sae_lens.TopKSAE,
    "abstopk": sae_lens.AbsTopKSAE,
    "jumprelu": sae_lens.JumpReLUSAE,
    "gated": sae_lens.GatedSAE,
}
CONFIGS = {
    "standard": sae_lens.StandardSAEConfig,
    "topk": sae_lens.TopKSAEConfig,
    "abstopk": sae_lens.AbsTopKSAEConfig,
    "jumprelu": sae_lens.JumpReLUSAEConfig,
    "gated": sae_lens.GatedSAEConfig,
}


def shaken(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights as a training may leave them: nothing is 0, and no two features are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))


def inputs() -> Tensor:
    return 2 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)) + 1


def compare(ours: SparseAutoencoder, theirs: Any, sparse: bool = True) -> None:
    x = inputs()
    with torch.no_grad():
        code = theirs.encode(x)
        assert code.any()
        assert not sparse or not code.all()
        torch.testing.assert_close(ours.encode(x), code, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.reconstruct(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_what_we_save_it_loads(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = SparseAutoencoder(WIDTH, FEATURES, **OURS[name])
    shaken(ours)
    with torch.no_grad():
        if ours.normalize == "norm_sqrt":
            ours.input_scale.fill_(1.7)
        if ours.activation == "gba":
            assert ours.encoder_bias is not None
            ours.encoder_bias.copy_(-torch.rand(FEATURES))
    save_saelens(ours, tmp_path / "sae", {"model_name": "none", "hook_name": "blocks.1"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.metadata.hook_name == "blocks.1"
    compare(ours, theirs, sparse=name != "topk of all")


@pytest.mark.parametrize("name", THEIRS)
def test_what_it_saves_we_load(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = name.partition(",")[0]
    theirs = CLASSES[architecture](CONFIGS[architecture](d_in=WIDTH, d_sae=FEATURES, **THEIRS[name]))
    shaken(theirs)
    theirs.save_model(tmp_path / "sae")
    ours = load_saelens(tmp_path / "sae")
    compare(ours, theirs)
    save_saelens(ours, tmp_path / "again")
    compare(ours, sae_lens.SAE.load_from_disk(tmp_path / "again"))


def test_what_it_trains_we_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=WIDTH, d_sae=FEATURES, k=5))
    shaken(theirs)
    theirs.save_inference_model(tmp_path / "sae")
    compare(load_saelens(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae"))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    theirs = sae_lens.MatchingPursuitSAE(sae_lens.MatchingPursuitSAEConfig(d_in=WIDTH, d_sae=FEATURES))
    theirs.save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match="architecture 'matching_pursuit': those that are read here are standard, topk"):
        load_saelens(tmp_path / "sae")
