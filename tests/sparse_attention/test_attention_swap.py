"""Sparse attention in models of transformers, and out again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_methods.sparse_attention.attention import NAME, AttentionSwap, attention_layers
from lit_methods.sparse_attention.blocks import KeptBlocks
from lit_methods.sparse_attention.method import AttentionCall, SparseAttention

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **more)).eval()


def models() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Name -> model and its input."""
    torch.manual_seed(0)
    tokens = {"input_ids": torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(0))}
    t = transformers
    return {
        "llama": (llama(), tokens),
        "gpt2": (t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)).eval(), tokens),
        "bert": (t.BertModel(t.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=64)).eval(), tokens),
        "vit": (
            t.ViTModel(t.ViTConfig(**SMALL, image_size=16, patch_size=4)).eval(),
            {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
        ),
    }


class Everything(SparseAttention):
    """All keys, told in every way; ``blocks`` of 8."""

    def __init__(self, last: bool = False) -> None:
        self.last, self.calls = last, []

    def _blocks(self, q: Tensor, k: Tensor, causal: bool) -> KeptBlocks:
        size = -(-k.shape[2] // 8)
        mask = torch.ones(q.shape[0], 1, size, size, dtype=torch.bool)
        return KeptBlocks.from_mask(torch.eye(size, dtype=torch.bool).expand_as(mask) if self.last else mask, 8, causal=causal)

    def prefill(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks:
        self.calls.append(("prefill", *call.key, k.shape[2]))
        return self._blocks(q, k, True)

    def denoise(self, q: Tensor, k: Tensor, call: AttentionCall) -> KeptBlocks:
        self.calls.append(("denoise", *call.key, k.shape[2]))
        return self._blocks(q, k, False)

    def decode(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        self.calls.append(("decode", *call.key, k.shape[2]))
        return torch.arange(k.shape[2]).expand(*k.shape[:2], -1)


def first_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_all_keys_give_what_the_model_gives_and_nothing_stays(name: str, kind: str) -> None:
    model, inputs = models()[name]
    model.set_attn_implementation(kind)  # type: ignore[operator]
    before, wanted, configs = (
        copy.deepcopy(model.state_dict()),
        first_output(model, inputs),
        {id(own.config) for own in model.modules() if hasattr(own, "config")},
    )
    with AttentionSwap(Everything()).attach(model) as swap:
        torch.testing.assert_close(first_output(model, inputs), wanted)
        assert {call[1] for call in swap.method.calls} == {0, 1}  # type: ignore[attr-defined]
        assert swap.sparsity("prefill" if name in ("llama", "gpt2") else "denoise") == 0
    with AttentionSwap(Everything(last=True)).attach(model):
        assert (first_output(model, inputs) - wanted).abs().max() > 1e-3
    assert torch.equal(first_output(model, inputs), wanted)
    assert {id(own.config) for own in model.modules() if hasattr(own, "config")} == configs
    assert NAME not in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert not [key for own in model.modules() for key in vars(own) if "lit_methods" in key]
    assert list(before) == list(model.state_dict())


def test_a_second_model_of_the_same_configuration_sees_nothing() -> None:
    config = transformers.LlamaConfig(**DECODER)
    torch.manual_seed(0)
    one, other = transformers.LlamaForCausalLM(config).eval(), transformers.LlamaForCausalLM(config).eval()
    tokens = models()["llama"][1]
    wanted = first_output(one, tokens), first_output(other, tokens)
    with AttentionSwap(Everything(last=True)).attach(one):
        assert torch.equal(first_output(other, tokens), wanted[1])
        assert not torch.equal(first_output(one, tokens), wanted[0])
        with AttentionSwap(Everything(last=True)).attach(other):
            assert not torch.equal(first_output(other, tokens), wanted[1])
        assert torch.equal(first_output(other, tokens), wanted[1])
    assert torch.equal(first_output(one, tokens), wanted[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_is_not_looked_at(side: str, kind: str, name: str) -> None:
    model, inputs = models()[name]
    model.set_attn_implementation(kind)  # type: ignore[operator]
    tokens = torch.cat([inputs["input_ids"], inputs["input_ids"][:1].flip(1)])
    mask = torch.ones_like(tokens)
    mask[1, (slice(0, 5) if side == "left" else slice(15, 20))] = 0
    padded = {"input_ids": tokens, "attention_mask": mask}
    wanted = first_output(model, padded)
    with AttentionSwap(Everything()).attach(model) as swap:
        torch.testing.assert_close(first_output(model, padded)[mask.bool()], wanted[mask.bool()])
        assert {call[2:] for call in swap.method.calls} == {(0, 20), (1, 15)} or {call[3] for call in swap.method.calls} == {15, 20}  # type: ignore[attr-defined]


@pytest.mark.parametrize("padded", [False, True])
def test_generating_with_a_cache(padded: bool) -> None:
    model, inputs = models()["llama"]
    tokens, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    if padded:
        mask[0, :4] = 0
    run = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(**run)  # type: ignore[operator]
    with AttentionSwap(Everything()).attach(model) as swap:
        assert torch.equal(model.generate(**run), wanted)  # type: ignore[operator]
        assert torch.equal(model.generate(**run, num_beams=3), model.generate(**run, num_beams=3))  # type: ignore[operator]
    assert swap.full["decode"] > 0
    assert swap.sparsity("decode") == 0


class Cut(SparseAttention):
    """Keeps the last 4 tokens, and the first."""

    def compress(self, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(k.shape[2])[-4:]]).expand(*k.shape[:2], -1)


def test_a_compressed_cache_is_what_later_queries_see() -> None:
    """The same as a mask over the cache that hides what was cut."""
    model, inputs = models()["llama"]
    tokens = inputs["input_ids"]
    more = torch.tensor([[7, 8, 9], [4, 5, 6]])
    mask = torch.ones(2, 23)
    mask[:, 1:16] = 0
    with torch.no_grad(), AttentionSwap(Cut()).attach(model) as swap:
        found = model(tokens, use_cache=True)
        steps = []
        for step in more.T:
            found = model(step[:, None], past_key_values=found.past_key_values, use_cache=True)
            steps.append(found.logits)
        assert swap.sparsity("decode") == pytest.approx(1 - (6 + 7 + 8) / (21 + 22 + 23))
    with torch.no_grad():
        plain = model(tokens, use_cache=True)
        for number, step in enumerate(more.T):
            plain = model(
                step[:, None], past_key_values=plain.past_key_values, attention_mask=mask[:, : 21 + number], use_cache=True,
                position_ids=torch.full((2, 1), 20 + number),
            )  # fmt: skip
            torch.testing.assert_close(steps[number], plain.logits)


class Slot(nn.Module):
    """A layer of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_function: Any = None

    def forward(self, q: Tensor) -> Tensor:
        if self.attention_function is not None:
            found: Tensor = self.attention_function(self, q, q, q, None, is_causal=False)[0].transpose(1, 2)
            return found
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_layers_with_a_slot() -> None:
    model, q = nn.Sequential(Slot()), torch.rand(1, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    with AttentionSwap(Everything()).attach(model) as swap:
        torch.testing.assert_close(model(q), nn.functional.scaled_dot_product_attention(q, q, q))
        assert swap.full["denoise"] == 2 * 400
    assert model[0].attention_function is None


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="has no attention layer"):
        AttentionSwap(Everything()).attach(nn.Linear(2, 2))
    model = llama()
    with pytest.raises(ValueError, match=r"it has model\.layers\.0\.self_attn"):
        attention_layers(model, ["*.attention"])
    assert list(attention_layers(model, ["*.1.self_attn"])) == ["model.layers.1.self_attn"]
    tokens = models()["llama"][1]["input_ids"]
    with AttentionSwap(Everything()).attach(model) as swap:
        with pytest.raises(ValueError, match="has a sparse attention already"):
            AttentionSwap(Everything()).attach(model)
        with pytest.raises(ValueError, match="in a model already"):
            swap.attach(llama())
        cache = model(tokens, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="several new tokens at once"):
            model(tokens[:, :3], past_key_values=cache)
        holes = torch.ones_like(tokens)
        holes[0, 5] = 0
        with pytest.raises(ValueError, match="amid a text"):
            model(tokens, attention_mask=holes)
    model = llama(attention_dropout=0.5).train()
    with AttentionSwap(Everything()).attach(model), pytest.raises(ValueError, match="drops attention weights"):
        model(tokens)
