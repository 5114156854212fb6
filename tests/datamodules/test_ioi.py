"""Prompts of indirect object identification, the activations on them, and the model that goes on from other activations."""

import pytest
import torch

from lit_methods.datamodules import IOIActivations
from lit_methods.datamodules.activations.harvest import TinyLanguageModel
from lit_methods.datamodules.activations.ioi import NAMES, OBJECTS, PLACES, PatchedModel, WordTokens, ioi_prompts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))


def test_prompts_say_what_their_attributes_say():
    prompts = ioi_prompts(400, NAMES[:5], seed=3)
    assert prompts == ioi_prompts(400, NAMES[:5], seed=3)
    assert prompts != ioi_prompts(400, NAMES[:5], seed=4)
    for one in prompts:
        io, s = NAMES[one.io], NAMES[one.s]
        assert io != s
        words = [word.strip(",.") for word in one.text.split()]
        assert (words.count(io), words.count(s)) == (1, 2)
        assert (words.index(s) < words.index(io)) == bool(one.pos)
        assert words[-1] == "to"
    assert {one.io for one in prompts} == {one.s for one in prompts} == set(range(5))
    assert 150 < sum(one.pos for one in prompts) < 250
    assert {one.template for one in prompts} == {0, 1, 2}


def test_the_word_lists_have_no_word_twice():
    words = [*NAMES, *OBJECTS, *PLACES]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(("position", "site"), [("end", "output"), ("io", "output"), ("s1", "input"), ("s2", "output")])
@torch.no_grad()
def test_the_models_own_activation_changes_nothing_and_another_one_does(position, site):
    data = IOIActivations(position=position, site=site, hook="blocks.0", num_train=12, num_val=6)
    data.setup("fit")
    rows = data.val_set.tensors
    words = WordTokens().words
    for row, place in enumerate(rows["place"].tolist()):
        name = data.name_list[rows["io" if position == "io" else "s"][row]]
        expected = words["to"] if position == "end" else words[name]
        assert int(rows["input_ids"][row, place]) == expected
    assert (rows["place"] <= rows["end"]).all()
    model = TinyLanguageModel(WordTokens().vocab_size).eval()
    tokens = torch.tensor([words[name] for name in data.name_list])
    whole = model(rows["input_ids"])[torch.arange(6), rows["end"]][:, tokens]
    torch.testing.assert_close(data.subject(rows["activation"], rows), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(data.subject(rows["activation"].flip(0), rows), whole, atol=1e-3)
    assert rows["answer"].equal(rows["io"])
    assert rows["foil"].equal(rows["s"])


@torch.no_grad()
def test_the_tail_is_what_follows_the_last_block():
    data, short = (IOIActivations(hook="blocks.1", tail=tail, num_train=8, num_val=4) for tail in (None, ["head"]))
    for one in (data, short):
        one.setup("fit")
    rows = data.val_set.tensors
    torch.testing.assert_close(short.subject(rows["activation"], rows), data.subject(rows["activation"], rows), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_part_of_the_width_is_patched_alone():
    data = IOIActivations(hook="blocks.0", columns=(8, 24), num_train=4, num_val=4)
    data.setup("fit")
    whole = IOIActivations(hook="blocks.0", num_train=4, num_val=4)
    whole.setup("fit")
    rows = whole.val_set.tensors
    assert data.width == 16
    assert data.val_set.tensors["activation"].equal(rows["activation"][:, 8:24])
    patched = rows["activation"].clone()
    patched[:, 8:24] = 0
    torch.testing.assert_close(data.subject(torch.zeros(4, 16), rows), whole.subject(patched, rows), rtol=1e-4, atol=1e-5)


def test_activations_are_kept_and_follow_model_and_prompts(tmp_path, monkeypatch):
    first = IOIActivations(num_train=8, num_val=4)
    first.setup("fit")
    assert len(list(tmp_path.glob("ioi-*"))) == 1
    monkeypatch.setattr("lit_methods.datamodules.activations.ioi.activations", None)  # not run again
    again = IOIActivations(num_train=8, num_val=4)
    again.setup("test")
    assert again.train_set.tensors["activation"].equal(first.train_set.tensors["activation"])
    with pytest.raises(TypeError):
        IOIActivations(num_train=8, num_val=4, data_seed=1).setup("fit")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"names": 2}, "names is 2"),
        ({"names": 99}, "has only 44 of our names as one token"),
        ({"position": "middle"}, "position"),
        ({"tail": ["head"], "position": "io"}, "leave position"),
        ({"hook": "block.1"}, "nearest of"),
        ({"tail": ["heads"]}, "hook='heads' is no submodule"),
    ],
)
def test_what_does_not_fit_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        IOIActivations(**{"num_train": 4, "num_val": 4, **given}).setup("fit")


def test_all_logits_without_answers():
    model = TinyLanguageModel(9).eval()
    rows = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "place": torch.tensor([1, 2]), "end": torch.tensor([2, 2])}
    assert PatchedModel(model, "blocks.0")(torch.zeros(2, 32), rows).shape == (2, 9)
