"""EPGPretrain and EPGFinetune by a Trainer against the page's loop: doublings, targets; then the stages of pairs, the frozen encoder."""

import copy

import torch
from torch import nn

from lit_methods import EPGFinetune, EPGPretrain
from lit_methods.consistency_models.epg.networks import Encoded
from lit_methods.seeds import own_seed, seeded_noise
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run


class Encoder(nn.Module):
    """Images (B, 1, 4, 4)."""

    width = 12

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(17, 12), nn.SiLU(), nn.Linear(12, 12))

    def forward(self, x, noise, condition=None):
        time = noise[:, None].to(x.dtype)
        found = self.layers(torch.cat([x.flatten(1), time], dim=1))
        return Encoded(found, found[:, None], (found[:, None],), time)


class Decoder(nn.Module):
    """Features to images."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 16)

    def forward(self, encoded, known):
        return self.layer(encoded.feature).view(-1, 1, 4, 4)


def level_of(step, count):
    generator = torch.Generator().manual_seed(own_seed(f"EPGPretrain level 0 {step}", 0))
    return int(torch.randint(1, count, (), generator=generator))


def test_runs_of_both_stages_are_the_loop(tmp_path):
    torch.manual_seed(0)
    names = ("image", "view1", "view2")
    batches = [{name: torch.rand(8, 1, 4, 4) * 2 - 1 for name in names} for _ in range(7)]
    first = {"projector_width": 10, "projector_dim": 6, "projector_layers": 2, "s0": 4, "s1": 16, "target_decay": 0.9}
    module, loop = EPGPretrain(Encoder(), warmup_steps=0, learning_rate=0.01, **first), page_loop("epg")
    encoder, projector = copy.deepcopy((module.encoder, module.projector))
    logs = run(module, batches)
    module.trainer.save_checkpoint(tmp_path / "first.ckpt")

    parameters = [*encoder.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.03)

    def normal(step, x):
        return seeded_noise(f"EPG 0 {step} noise", 0, x)

    wanted, targets = loop.train(encoder, projector, optimizer, batches, level_of, normal, 4, 16, target_decay=0.9)
    assert {step["epg/levels"] for step in wanted} == {5, 9, 17}
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    pairs = [(module.encoder, encoder), (module.projector, projector), (module.target_encoder, targets[0])]
    for ours, theirs in (*pairs, (module.target_projector, targets[1])):
        assert_same_state(ours, theirs, TOLERANCE[torch.float32])

    stages = {"ect_delta": 0, "ect_first": 2, "ect_length": 2}
    decoder, settings = Decoder(), {"mode": "consistency", "warmup_steps": 0, "learning_rate": 0.01, "grid": 0}
    module = EPGFinetune(Encoder(), copy.deepcopy(decoder), encoder_ckpt=str(tmp_path / "first.ckpt"), **stages, **settings)
    logs = run(module, batches)

    def normal_of(step, x, what="noise"):
        return seeded_noise(f"EPGFinetune {what} 0 {step}", 0, x)

    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    wanted = loop.tune(encoder, decoder, projector, optimizer, batches, normal_of, 0, 2, 2)
    assert [step["epg/stage"] for step in wanted] == [0, 0, 1, 1, 2, 2, 3]
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    for ours, theirs in ((module.encoder, encoder), (module.decoder, decoder)):
        assert_same_state(ours, theirs, TOLERANCE[torch.float32])
