"""CoPrompt by a Trainer against the page's loop: prompts of both towers, adapters, sentences that change, the rates of three epochs."""

import copy

import torch

from lit_methods import CoPrompt
from lit_methods.prompting.tiny import TinyTowers
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run


def test_a_run_is_the_loop():
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "image": torch.randn(4, 3, 24, 24, generator=generator),
            "image_second": torch.randn(4, 3, 24, 24, generator=generator),
            "label": torch.randint(3, (4,), generator=generator),
        }
        for _ in range(2)
    ]
    classes = ["red_circle", "blue square", "green cross"]
    descriptions = {name: [f"a {name}", f"this is a large {name}", f"{name} on white"] for name in classes}
    towers = TinyTowers(pretrain_steps=0)
    torch.manual_seed(0)
    module = CoPrompt(copy.deepcopy(towers), num_context=2, depth=3, context_init="a photo", learning_rate=0.1, warmup_learning_rate=1e-5)
    module.set_classes(classes, descriptions=descriptions)
    prompts, adapters = copy.deepcopy((module.prompts, [module.image_adapter, module.text_adapter]))
    logs = run(module, batches, max_epochs=3)

    parameters = [parameter for part in (prompts, *adapters) for parameter in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    names = [name.replace("_", " ") for name in classes]
    wanted = page_loop("coprompt").train(towers.requires_grad_(False), prompts, adapters, optimizer, batches, 3, names, descriptions)
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    for ours, theirs in ((module.prompts, prompts), (module.image_adapter, adapters[0]), (module.text_adapter, adapters[1])):
        assert_same_state(ours, theirs, TOLERANCE[torch.float32])
    assert wanted[-1]["prompting/cross_entropy"] != wanted[1]["prompting/cross_entropy"]
