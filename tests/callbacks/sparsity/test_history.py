"""What masks have been through, and masks as bits."""

import numpy as np
import pytest
import torch

from lit_methods.callbacks.sparsity.history import MaskHistory, flips, pack, pack_bits, unpack, unpack_bits

ON, OFF = True, False
STEPS = [{"a": torch.tensor(row)} for row in ([ON, ON, OFF, OFF], [ON, OFF, ON, OFF], [ON, OFF, OFF, OFF])]


def test_each_kind_is_remembered_and_nothing_else():
    history = MaskHistory("first", "last", "ever", "always")
    alone = MaskHistory("ever")
    for masks in STEPS:
        history.note(masks)
        alone.note(masks)
    assert history.first["a"].tolist() == [ON, ON, OFF, OFF]
    assert history.last["a"].tolist() == [ON, OFF, OFF, OFF]
    assert history.ever["a"].tolist() == alone.ever["a"].tolist() == [ON, ON, ON, OFF]
    assert history.always["a"].tolist() == [ON, OFF, OFF, OFF]
    assert alone.first == alone.last == alone.always == {}


def test_weights_that_join_later_start_their_own_history():
    history = MaskHistory("first", "last")
    history.note(STEPS[0])
    late = {"a": STEPS[1]["a"], "b": torch.tensor([OFF, OFF])}
    assert int(flips(history.last, late)) == 2, "a weight without a last mask has not changed"
    history.note(late)
    assert history.first["b"].tolist() == [OFF, OFF]
    assert int(flips(history.last, late)) == 0
    assert int(flips({}, late)) == 0


def test_changes_are_told_apart_from_the_same_masks():
    history = MaskHistory("last")
    assert history.change(STEPS[0]) is None, "the first masks are no change"
    history.note(STEPS[0])
    assert history.change({"a": STEPS[0]["a"].clone()}) is None
    change = history.change(STEPS[1])
    assert change is not None
    assert (change.changed, change.survival, change.jaccard) == (0.5, 0.5, pytest.approx(1 / 3))


def test_a_state_goes_on_where_it_was_saved():
    history, again = MaskHistory("first", "ever"), MaskHistory("first", "ever")
    for masks in STEPS[:2]:
        history.note(masks)
    state = history.state(start="first", seen="ever")
    assert set(state) == {"start", "seen"}
    again.load(state, {"a": torch.zeros(4)}, start="first", seen="ever")
    for copy in (history, again):
        copy.note(STEPS[2])
    assert torch.equal(again.first["a"], history.first["a"])
    assert torch.equal(again.ever["a"], history.ever["a"])


@pytest.mark.parametrize("shape", [(3, 5), (8,), (2, 4, 3), (0, 4)])
def test_masks_as_bits_are_those_of_numpy_in_both_orders(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for low_first, order in ((False, "big"), (True, "little")):
        packed = pack_bits(mask, low_first=low_first)
        assert torch.equal(packed, torch.from_numpy(np.packbits(mask.numpy(), bitorder=order)))
        assert torch.equal(unpack_bits(packed, shape, low_first=low_first), mask)
    assert torch.equal(unpack(pack({"w": mask}))["w"], mask)
