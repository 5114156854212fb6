"""A frozen module is there when it is called, and nowhere else."""

import copy
import pickle

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import Classifier, Images, small_network, tiny_trainer
from lit_methods.frozen import Frozen


class Student(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = Frozen(small_network())


def test_unknown_to_the_parent() -> None:
    student = Student()
    inside = {id(p) for p in student.frozen.module.parameters()}
    assert inside
    assert not inside & {id(p) for p in student.parameters()}
    assert not any(name.startswith("frozen") for name in student.state_dict())
    assert all(module is not student.frozen.module for module in student.modules())
    student.load_state_dict(Classifier().state_dict(), strict=True)
    student.requires_grad_(True)
    assert not any(p.requires_grad for p in student.frozen.module.parameters())


def test_train_never_changes_it() -> None:
    student = Student().train()
    assert student.network.training
    assert not any(module.training for module in student.frozen.module.modules())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(student.frozen(x), student.frozen(x))  # no dropout, no batch statistics
    student.frozen.train(True)
    assert not student.frozen.module[3].training


def test_output_has_no_gradient_but_autograd_may_use_it() -> None:
    frozen = Frozen(nn.Linear(3, 2))
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(2, requires_grad=True)
    out = frozen(x)
    assert not out.requires_grad
    assert not out.is_inference()
    (out * weight).sum().backward()  # an inference tensor would raise here
    assert x.grad is None
    torch.testing.assert_close(weight.grad, out.sum(0))


def test_follows_moves_and_casts() -> None:
    parent = nn.Sequential(Frozen(nn.Linear(3, 2)))
    parent.double()
    assert parent(torch.randn(1, 3, dtype=torch.float64)).dtype == torch.float64
    parent.to("meta")
    assert parent[0].module.weight.device.type == "meta"


def test_copies_and_pickles_with_its_parent() -> None:
    student = Student()
    x = torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert twin.frozen.module is not student.frozen.module
        assert torch.equal(twin.frozen(x), student.frozen(x))
        assert not any(module.training for module in twin.frozen.module.modules())
        assert not any(name.startswith("frozen") for name in twin.state_dict())


class Distils(Student):
    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self.network(batch[0]) - self.frozen(batch[0])).square().mean()


def test_training_leaves_it_as_it_was() -> None:
    pl.seed_everything(0, verbose=False)
    module = Distils()
    before = copy.deepcopy(module.frozen.module.state_dict())
    start = module.network[0].weight.detach().clone()
    trainer = tiny_trainer(max_steps=3)
    trainer.fit(module, DataLoader(Images(), batch_size=8))
    assert all(torch.equal(before[name], value) for name, value in module.frozen.module.state_dict().items())
    assert not torch.equal(start, module.network[0].weight)
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in module.frozen.module.parameters()}
