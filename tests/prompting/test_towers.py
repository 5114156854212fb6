"""The two towers: equal to transformers' CLIP, prompts where they belong, errors."""

import json
from pathlib import Path

import pytest
import torch

from lit_methods.datamodules.fewshot import coloured_shapes as shapes
from lit_methods.prompting.tiny import TinyTowers, WordTokenizer, pretrain
from lit_methods.prompting.towers import CLIPTowers, ResidualBlock, TowerSizes, TwoTowers, run_prompted_blocks


def save_clip(folder: Path):
    """A tiny CLIP with random weights, as transformers saves it; its tokenizer knows a few words."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 12, "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    image = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=10)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases, too
    model.save_pretrained(folder)
    return model


def test_towers_of_a_folder_equal_the_clip_of_transformers(tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    towers = CLIPTowers(tmp_path)
    ids = towers.tokenize(["a cat", "of"])
    assert ids.shape == (2, 12)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(torch.nn.functional.normalize(towers.encode_image(images), dim=1), theirs.image_embeds)
        torch.testing.assert_close(torch.nn.functional.normalize(towers.encode_text(ids), dim=1), theirs.text_embeds)
        torch.testing.assert_close(towers.encode_text(towers.cut(ids)), towers.encode_text(ids))  # what is behind the end says nothing
        torch.testing.assert_close(towers(images, ids), theirs.logits_per_image, rtol=1e-4, atol=1e-4)
    assert towers.cut(ids).shape[1] < 12


def test_a_folder_without_clip_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*openai/clip-vit-base-patch16"):
        CLIPTowers(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model"):
        CLIPTowers(tmp_path)


def test_without_transformers_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"lit-methods\[transformers\]"):
        CLIPTowers(tmp_path)


@pytest.mark.parametrize("place", ["after_first", "end"])
def test_prompts_are_replaced_from_the_second_block_on(place: str) -> None:
    seen: list[torch.Tensor] = []

    def block(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return tokens + 1

    tokens, prompts = torch.zeros(2, 5, 3), torch.full((1, 2, 3), 50.0)
    out = run_prompted_blocks([block, block, block], tokens, prompts, place)  # type: ignore[arg-type]
    where = slice(1, 3) if place == "after_first" else slice(3, 5)
    assert seen[0] is tokens
    assert (seen[1][:, where] == 50).all()
    assert (seen[2][:, where] == 51).all()  # there are none for the third block: it leaves them
    rest = torch.ones(5, dtype=torch.bool)
    rest[where] = False
    assert (out[:, rest] == 3).all()
    with pytest.raises(ValueError, match="don't fit"):
        run_prompted_blocks([block], tokens, torch.zeros(1, 6, 3), place)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width 4"):
        run_prompted_blocks([block], tokens, torch.zeros(1, 2, 4), place)  # type: ignore[arg-type]


def test_no_token_of_a_causal_block_looks_ahead() -> None:
    block = ResidualBlock(8, 2, causal=True)
    tokens = torch.randn(1, 4, 8)
    changed = tokens.clone()
    changed[:, 3] = torch.randn(8)
    torch.testing.assert_close(block(changed)[:, :3], block(tokens)[:, :3])
    block.causal = False
    assert not torch.allclose(block(changed)[:, :3], block(tokens)[:, :3])


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 24, 24\); set the datamodule's image_size"):
        TinyTowers(0).encode_image(torch.zeros(2, 3, 32, 32))


def test_words_become_numbers() -> None:
    ids = WordTokenizer(["a", "cat"], length=5)(["A cat.", "dog", "a a a a a a"])
    assert ids.tolist() == [[1, 4, 5, 2, 0], [1, 3, 2, 0, 0], [1, 4, 4, 4, 2]]


def test_random_towers_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, other = TinyTowers(0), TinyTowers(0)
    assert torch.rand(1) == expected
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    kinds = [*shapes.all_classes("shapes"), *shapes.all_classes("digits")]
    longest = max(len(shapes.split_words(text)) for own in kinds for text in shapes.captions(*own))
    assert longest + 2 <= one.sizes.context_length, "a caption would be cut"


def test_towers_of_digits_know_their_words_and_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    TinyTowers(2), TinyTowers(2, pictures="digits")
    assert len(list((tmp_path / "tiny_towers").iterdir())) == 2
    digits = TinyTowers(0, pictures="digits")
    assert 3 not in digits.tokenize(["an azure four", "a rose zero"]), "no word is unknown"
    assert 3 in TinyTowers(0).tokenize(["an azure four"])


def test_pretraining_learns_is_repeatable_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    first = TinyTowers(3)
    (file,) = (tmp_path / "tiny_towers").iterdir()
    again = TinyTowers(0)
    pretrain(again, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    saved = torch.load(file, weights_only=True)
    torch.save({name: value + 1 if name == "class_token" else value for name, value in saved.items()}, file)
    assert torch.equal(TinyTowers(3).class_token, first.class_token + 1)  # read, not computed
    assert not torch.equal(first.class_token, TinyTowers(0).class_token)


def test_sizes_are_plain() -> None:
    sizes = TowerSizes(8, 4, 8, 1, 2, 8, 1, 2, 10, 6, 4)
    towers = TwoTowers(sizes, WordTokenizer(["a"], 6), 2)
    assert towers(torch.zeros(2, 3, 8, 8), towers.tokenize(["a", "b", "a a"])).shape == (2, 3)
