"""VideoDiffusionModule by a Trainer against the page's loop: training with dropped prompts, and a long video of two prompts."""

import copy

import torch

from lit_methods import LongVideoSampler, SmallVideoUNet, VideoDiffusionModule
from lit_methods.seeds import own_seed, seeded_noise
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run


def draws_of(step):
    """The run's own random numbers."""
    return torch.Generator().manual_seed(own_seed(f"VideoDiffusionModule 0 {step} {step}", 0))


def test_a_run_is_the_loop():
    torch.manual_seed(0)
    network = SmallVideoUNet(channels=16)
    batches = [{"video": torch.randn(4, 5, 1, 4, 4), "prompt": torch.randint(10, (4, 3)), "index": torch.arange(4)} for _ in range(4)]
    sampler = LongVideoSampler(frames=5, left=2, right=2, steps=3, guided_until=2, delta=10.0, stride=2)
    module = VideoDiffusionModule(
        copy.deepcopy(network), sampler, (1, 4, 4), drop_prompt=0.5, learning_rate=1e-2, schedule="constant", strips=0
    )
    logs = run(module, batches)

    loop = page_loop("cono")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.01)
    wanted = loop.train(network, optimizer, batches, draws_of, 0.5)
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    assert_same_state(module.network, network, TOLERANCE[torch.float32])

    with torch.no_grad():
        found = module.predict_step(batches[0], 0)["video"]
    places = [f"VideoDiffusionModule clip 0 of {number}" for number in range(4)]
    noise = torch.stack([seeded_noise(place, 0, torch.empty(5, 1, 4, 4)) for place in places])
    video = loop.sample(network, noise, list(batches[0]["prompt"].unbind(1)), 3, 2, 2, 2, 10.0)
    assert video.shape == (4, 11, 1, 4, 4)
    torch.testing.assert_close(found, video, rtol=1e-5, atol=1e-5)
