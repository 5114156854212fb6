"""SparseJEPA by a Trainer against the page's loop: weights, target encoder and logs, through columns that become exactly 0."""

import copy

import pytest
import torch

from lit_methods import SparseJEPA, ViTEncoder
from lit_methods.seeds import own_seed, seeded_noise
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

STEPS, LATENTS = 5, 6


def generators_of(step):
    """The run's own random numbers: of the masks' sizes and of their places."""
    return [torch.Generator().manual_seed(own_seed(f"IJEPA {what} step {step} batch {step}", 0)) for what in ("sizes", "places on rank 0")]


@pytest.mark.parametrize("dtype", both_dtypes)
@pytest.mark.parametrize("mode", ["proximal", "penalty"])
def test_a_run_is_the_loop(dtype, mode):
    torch.manual_seed(0)
    encoder = ViTEncoder(image_size=12, patch_size=2, width=16, depth=2, heads=2)
    module = SparseJEPA(
        encoder, groups=4, latents=LATENTS, map_width=2, sparse_weight=0.5, sparsity=100.0, mode=mode, predictor_width=8, predictor_depth=1,
        min_keep=2, warmup_epochs=0.4, learning_rate=1e-2, momentum=0.9,
    )  # fmt: skip
    if dtype == torch.float64:
        module.double()
    parts = copy.deepcopy([module.encoder, module.target_encoder, module.predictor, module.sparse])
    batches = [{"image": torch.randn(4, 3, 12, 12).to(dtype)} for _ in range(STEPS)]
    logs = run(module, batches)

    def noise_of(step):
        return seeded_noise(f"SparseJEPA latents step {step} batch {step} on rank 0", 0, torch.empty(4, LATENTS))

    named = {f"{place}.{name}": parameter for place in (0, 2, 3) for name, parameter in parts[place].named_parameters()}
    bare = {name for name, parameter in named.items() if parameter.ndim < 2 or "bias" in name or name == "3.maps.weight"}
    groups = [[named[name] for name in named if name not in bare], [named[name] for name in named if name in bare]]
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], weight_decay=0.04)
    wanted = page_loop("sparsejepa").train(
        *parts, optimizer, batches, generators_of, noise_of, grid=(6, 6), min_keep=2, rates=(2e-4, 1e-2, 1e-6), warmup_steps=2,
        decays=(0.04, 0.4), momentum=0.9, sparse_weight=0.5, sparsity=100.0, proximal=mode == "proximal",
    )  # fmt: skip
    zeros = [float(step["sparsejepa/zero_groups"]) for step in wanted]
    assert (zeros[0] < zeros[-1] > 0) if mode == "proximal" else not any(zeros), "columns die on the way, or never"
    # the module's own callback stands behind the one that keeps the logs, which so sees its figures a step later
    late = [{name: step.pop(name) for name in list(step) if name in ("sparsejepa/zero_groups", "sparsejepa/penalty")} for step in wanted]
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    assert_same_logs(logs[1:], late[:-1], TOLERANCE[torch.float32])
    tolerance = TOLERANCE[torch.float32]  # the latents' noise, and what is logged, is float32 in either
    for ours, theirs in zip((module.encoder, module.target_encoder, module.predictor, module.sparse), parts, strict=True):
        assert_same_state(ours, theirs, tolerance)
