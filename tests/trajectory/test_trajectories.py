"""The comparison itself: what differs is found, and a page without its loop."""

import copy
from pathlib import Path

import pytest
import torch

from trajectories import PAGES, PlainClassifier, assert_same_logs, assert_same_state, labelled, page_loop, run, small_mlp


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_loop_that_computes_something_else_is_found(tmp_path: Path) -> None:
    network, batches = small_mlp(torch.float64), labelled(3, torch.float64)
    module = PlainClassifier(copy.deepcopy(network), sgd)
    logs = run(module, batches)
    loop = """```python
# plain_loop.py
from torch.nn.functional import cross_entropy


def train(network, optimizer, batches, factor):
    logs = []
    for batch in batches:
        loss = factor * cross_entropy(network(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logs.append({"loss": loss.detach()})
    return logs
```
"""
    (tmp_path / "plain.md").write_text(f"A page.\n\n{loop}")
    train = page_loop("plain", tmp_path).train
    for factor, differs in ((1.0, False), (1.0 + 1e-9, True)):
        own = copy.deepcopy(network)
        wanted = train(own, sgd(own.parameters()), batches, factor)
        if not differs:
            assert_same_logs(logs, wanted, 1e-12)
            assert_same_state(module.network, own, 1e-12)
            continue
        with pytest.raises(AssertionError, match="step 0, loss"):
            assert_same_logs(logs, wanted, 1e-12)
        with pytest.raises(AssertionError, match=r"\d\.(weight|bias)"):
            assert_same_state(module.network, own, 1e-12)


def test_what_is_not_logged_and_steps_that_are_missing_are_found() -> None:
    run_logs = [{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}]
    with pytest.raises(AssertionError, match="logs no other"):
        assert_same_logs(run_logs, [{"loss": 1.0}, {"other": 2.0}], 1e-6)
    with pytest.raises(AssertionError, match="the run has 2 steps, the loop 1"):
        assert_same_logs(run_logs, [{"loss": 1.0}], 1e-6)
    with pytest.raises(AssertionError, match="the loop logs nothing"):
        assert_same_logs(run_logs, [{"loss": 1.0}, {}], 1e-6)
    with pytest.raises(AssertionError, match="names differ"):
        assert_same_state({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, 1e-6)


def test_a_page_without_its_loop_is_found(tmp_path: Path) -> None:
    (tmp_path / "empty.md").write_text("```python\n# another_loop.py\n```\n")
    with pytest.raises(AssertionError, match=r"no Python block that begins with # empty_loop\.py"):
        page_loop("empty", tmp_path)
    (tmp_path / "empty.md").write_text("```python\n# empty_loop.py\nx = 1\n```\n")
    with pytest.raises(AssertionError, match="defines no train"):
        page_loop("empty", tmp_path)
    assert (PAGES / "tcm.md").is_file()
