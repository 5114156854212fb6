"""diffusers itself, where the other tests take classes of its interface: autoencoder, U-Net and DiT from a config, Wan with equal weights.

pip install "lit-methods[diffusers]"
"""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from helpers import tiny_trainer
from lit_methods import SLCT, ConsistencyTraining
from lit_methods.consistency_models.latents import DiffusersAutoencoder, DiffusersNetwork
from lit_methods.consistency_models.rcm.wan import WanTransformer

diffusers = pytest.importorskip("diffusers", reason='diffusers is not installed: pip install "lit-methods[diffusers]"')
pytestmark = pytest.mark.slow

# our names, which are those of the published weights, in diffusers' words
WAN_NAMES = (
    (r"^text_embedding\.(0|2)", lambda found: f"condition_embedder.text_embedder.linear_{1 + int(found[1]) // 2}"),
    (r"^time_embedding\.(0|2)", lambda found: f"condition_embedder.time_embedder.linear_{1 + int(found[1]) // 2}"),
    (r"^time_projection\.1", lambda found: "condition_embedder.time_proj"),
    (r"^head\.head", lambda found: "proj_out"),
    (r"^head\.modulation", lambda found: "scale_shift_table"),
    (r"modulation$", lambda found: "scale_shift_table"),
    (r"self_attn", lambda found: "attn1"),
    (r"cross_attn", lambda found: "attn2"),
    (r"norm3", lambda found: "norm2"),
    (r"\.(q|k|v)\.", lambda found: f".to_{found[1]}."),
    (r"\.o\.", lambda found: ".to_out.0."),
    (r"ffn\.0", lambda found: "ffn.net.0.proj"),
    (r"ffn\.2", lambda found: "ffn.net.2"),
)


def test_an_autoencoder_from_a_folder_computes_as_diffusers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    theirs = diffusers.AutoencoderKL(**blocks, block_out_channels=[8] * 4, norm_num_groups=4, layers_per_block=1).eval()
    theirs.save_pretrained(tmp_path)
    ours = DiffusersAutoencoder(tmp_path).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(images)
        assert latents.shape == (2, 4, 4, 4)
        assert torch.equal(latents, theirs.encode(images).latent_dist.mean)
        assert torch.equal(ours.decode(latents), theirs.decode(latents).sample)


@pytest.mark.parametrize("kind", ["UNet2DModel", "DiTTransformer2DModel"])
def test_a_network_trains(kind: str) -> None:
    torch.manual_seed(0)
    small = {
        "UNet2DModel": {"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
        "DiTTransformer2DModel": {"sample_size": 8, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 1}
        | {"num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 10},
    }[kind]
    module = ConsistencyTraining(DiffusersNetwork(small, kind=kind), num_classes=None)  # type: ignore[arg-type]
    before = [weight.clone() for weight in module.parameters()]
    batches = DataLoader([{"image": torch.randn(4, 8, 8)} for _ in range(12)], batch_size=4)  # type: ignore[arg-type]
    trainer = tiny_trainer(max_steps=3)
    trainer.fit(module, train_dataloaders=batches)
    assert torch.isfinite(trainer.callback_metrics["consistency/loss"])
    assert any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert module(torch.randn(2, 4, 8, 8), torch.tensor([0.01, 80.0])).shape == (2, 4, 8, 8)


def test_the_full_recipes_dit_is_one_that_diffusers_knows() -> None:
    recipe = yaml.safe_load(Path("configs/full/slct_celebahq_dit.yaml").read_text())["model"]["init_args"]
    arguments = recipe["network"]["init_args"]
    with torch.device("meta"):
        network = DiffusersNetwork(**arguments)
        module = SLCT(network, **{key: recipe[key] for key in ("s0", "s1", "remove_scales")})
        assert 100e6 < sum(weight.numel() for weight in module.network.parameters()) < 150e6  # DiT-B/2 has 130 million


@pytest.mark.parametrize("sizes", [(1, 4, 6), (3, 4, 4)])
def test_wan_equals_diffusers_with_the_same_weights(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    heads, width = 2, 24
    ours = WanTransformer(channels=4, width=width, hidden=32, heads=heads, depth=2, text_width=8, time_width=16).double().eval()
    sizes_of_theirs = {"num_attention_heads": heads, "attention_head_dim": width // heads, "in_channels": 4, "out_channels": 4}
    theirs = diffusers.WanTransformer3DModel(**sizes_of_theirs, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2).double().eval()
    weights = {}
    for name, value in ours.state_dict().items():
        torch.nn.init.normal_(value, std=0.3)
        for pattern, word in WAN_NAMES:
            name = re.sub(pattern, word, name)
        weights[name] = value
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    theirs.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()}, strict=True)
    x, time, prompt = torch.randn(2, 4, *sizes).double(), torch.tensor([17.0, 803.0]).double(), torch.randn(2, 5, 8).double()
    with torch.no_grad():
        found, expected = ours(x, time, prompt), theirs(x, time, prompt).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # diffusers embeds the time in float32
