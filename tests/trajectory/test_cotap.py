"""CoTAP by a Trainer against the page's loop: student, teacher, queues and losses, through the k-means of the object prototypes."""

import copy

import pytest
import torch

from lit_methods import CoTAP, ObjectAwareViT
from lit_methods.datamodules import NeighbourCropsDataModule
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

STEPS = 4


def noise_of(what, step, *shape):
    """The run's own random numbers."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(own_seed(f"CoTAP {what} step {step} batch {step}", 0)))


@pytest.mark.parametrize("dtype", both_dtypes)
def test_a_run_is_the_loop(dtype):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "width": 8, "depth": 2, "heads": 2, "prototypes": 3}
    encoder = ObjectAwareViT("vit_tiny_patch16_224", pretrained=False, **sizes)
    module = CoTAP(
        encoder, patch_prototypes=6, cls_prototypes=5, head_hidden=8, head_width=4, patch_queue=40, cls_queue=30, patches_per_step=32,
        bank=20, bank_per_step=4, pool_sizes=(2, 4), top_patches=2, others=2, learning_rate=1e-3, head_learning_rate=1e-2,
        momentum=(0.9, 0.95),
    )  # fmt: skip
    if dtype == torch.float64:
        module.double()
    student, teacher = copy.deepcopy([module.student, module.teacher])
    data = NeighbourCropsDataModule(image_size=16, local_size=8, local_crops=1, num_train=12, num_probe=1, num_val=1, batch_size=3)
    data.setup("fit")
    batches = [{name: value.to(dtype) for name, value in batch.items()} for batch in data.train_dataloader()][:STEPS]
    logs = run(module, batches)

    groups = []
    for head, rate in ((False, 1e-3), (True, 1e-2)):
        named = [(name, parameter) for name, parameter in student.named_parameters() if name.startswith("encoder.") != head]
        bare = [name.endswith("bias") or parameter.ndim < 2 for name, parameter in named]
        for undecayed in (False, True):
            chosen = [parameter for (_, parameter), one in zip(named, bare, strict=True) if one == undecayed]
            groups.append({"params": chosen, "lr": rate, "decays": not undecayed})
    before = student.encoder.prototypes.detach().clone()
    wanted, queues = page_loop("cotap").train(
        student, teacher, torch.optim.AdamW(groups), batches, noise_of, torch.Generator().manual_seed(own_seed("CoTAP centres", 0)),
        pools=(2, 4), top=2, others=2, lengths=(40, 30, 20), per_step=(32, 4), momentum=(0.9, 0.95), decays=(0.024, 0.24), patch_size=4,
    )  # fmt: skip
    assert module.bank.clustered
    assert (student.encoder.prototypes - before).abs().max() > 0.3, "centres took the place of the first prototypes"
    tolerance = 100 * TOLERANCE[torch.float32] if dtype == torch.float32 else 100 * TOLERANCE[torch.float64]  # Adam enlarges rounding
    assert_same_logs(logs, wanted, tolerance)
    assert_same_state(module.student, student, tolerance)
    assert_same_state(module.teacher, teacher, tolerance)
    for queue, rows in zip((module.patch_queue, module.cls_queue, module.bank), queues, strict=True):
        torch.testing.assert_close(queue.values(), rows, rtol=tolerance, atol=tolerance)
