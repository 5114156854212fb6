"""Masked diffusion: LLaDA's noise and loss, the loops, the host on models of transformers, folders of LLaDA and Dream."""

import json
import re
import time

import pytest
import torch
from full_recipes import llada_folder

from helpers import assert_state_dicts_equal, cloned_state, kill_and_resume, tiny_trainer
from lit_methods.callbacks import ExactResume
from lit_methods.callbacks.run.progress import ThroughputProgressBar
from lit_methods.datamodules import RepeatedTextDataModule, TextDataModule
from lit_methods.tasks.language.denoising import (
    DenoisingStep,
    dream_generate,
    gumbel_scores,
    llada_generate,
    mask_tokens,
    masked_diffusion_loss,
    masking_rates,
    nucleus,
    reveal,
    shifted_right,
    token_confidence,
    transfer_counts,
)

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
LLAMA = {"model_type": "llama", "vocab_size": 49, **SIZES}
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
MODERNBERT = {"model_type": "modernbert", "vocab_size": 49, **SPECIAL, **SIZES}


def model(**kwargs):
    pytest.importorskip("transformers")
    from lit_methods import MaskedDiffusionLM

    torch.manual_seed(0)
    return MaskedDiffusionLM(**({"config": LLAMA, "answer_length": 4, "steps": 4, "learning_rate": 1e-2} | kwargs))


def data(**kwargs):
    return RepeatedTextDataModule(**({"block_size": 16, "repeated": 4, "batch_size": 8} | kwargs))


# ---- the objective


def test_the_prompt_is_never_masked_and_the_rate_is_kept():
    tokens = torch.arange(4000).reshape(2, 2000) % 7
    rates = masking_rates(torch.tensor([0.0, 0.5]))
    noisy, masked = mask_tokens(tokens, rates, torch.rand(2, 2000, generator=torch.Generator().manual_seed(0)), 9, start=1000)
    assert not masked[:, :1000].any()
    assert (noisy[masked] == 9).all()
    assert torch.equal(noisy[~masked], tokens[~masked])
    assert masked[0].sum() < 10
    assert 400 < masked[1].sum() < 600


def test_the_loss_is_the_weighted_sum_over_masks():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, 1, 4], [1, 1, 2]])
    masked, rates = torch.tensor([[True, False, True], [False, True, False]]), torch.tensor([0.5, 0.25])
    log_p = logits.log_softmax(-1)
    expected = -((log_p[0, 0, 0] + log_p[0, 2, 4]) / 0.5 + log_p[1, 1, 1] / 0.25) / 6
    torch.testing.assert_close(masked_diffusion_loss(logits, tokens, masked, rates, 3), expected)
    assert masked_diffusion_loss(logits, tokens, torch.zeros_like(masked), rates, 3) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked_diffusion_loss(logits.bfloat16(), tokens, masked, rates, 3).dtype == torch.float32


# ---- choosing tokens


def test_counts_come_out_even():
    masked = torch.tensor([[True] * 7, [True] * 2 + [False] * 5, [False] * 7])
    assert transfer_counts(masked, 3).tolist() == [[3, 2, 2], [1, 1, 0], [0, 0, 0]]


def test_reveal_takes_the_surest_and_leaves_what_may_not_be():
    tokens, chosen = torch.zeros(3, 4, dtype=torch.int64), torch.full((3, 4), 5)
    confidence = torch.tensor([[0.1, 0.9, 0.5, -torch.inf], [-torch.inf] * 4, [0.3, 0.2, 0.1, 0.4]])
    found = reveal(tokens, chosen, confidence, torch.tensor([2, 3, 0]))
    assert found.tolist() == [[0, 5, 5, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not tokens.any()


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([0.5, 0.2, 0.2999, 0.0001]).log()
    assert (nucleus(logits, 0.75) > -torch.inf).tolist() == [True, False, True, False]
    assert (nucleus(logits, 0.01) > -torch.inf).tolist() == [True, False, False, False]
    assert torch.equal(nucleus(logits, 1.0), logits)


def test_confidences():
    p = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    chosen = torch.tensor([1, 0])
    torch.testing.assert_close(token_confidence(p, chosen, "maskgit_plus"), torch.tensor([0.3, 1.0]))
    torch.testing.assert_close(token_confidence(p, chosen, "topk_margin"), torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(token_confidence(p, chosen, "entropy"), torch.tensor([-1.0297, 0.0]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="kind is 'best'"):
        token_confidence(p, chosen, "best")


def test_gumbel_noise_draws_from_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    draws = gumbel_scores(logits.expand(20000, 3), 1.0, torch.rand(20000, 3, generator=generator, dtype=torch.float64)).argmax(-1)
    torch.testing.assert_close(draws.bincount(minlength=3) / 20000, logits.softmax(-1).float(), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="pass a generator"):
        gumbel_scores(logits, 1.0, None)


# ---- the loops


def counting(tokens):
    """A denoiser that wants token = position, and is surer the further left it looks."""
    wanted = torch.nn.functional.one_hot(torch.arange(tokens.shape[1]) % 8, 9).double()
    return (wanted * torch.linspace(9, 4, tokens.shape[1])[:, None]).expand(len(tokens), -1, -1)


@pytest.mark.parametrize("block", [2, 4, 8])
def test_llada_writes_block_after_block(block):
    seen: list[DenoisingStep] = []
    found = llada_generate(counting, torch.zeros(3, 2, dtype=torch.int64), 8, 8, block, 8, announce=seen.append)
    assert found[:, 2:].tolist() == [[2, 3, 4, 5, 6, 7, 0, 1]] * 3
    assert [step.index for step in seen] == list(range(8))
    assert {(step.steps, step.new_tokens) for step in seen} == {(8, 8)}
    for step in seen:
        begun = step.index // block * block
        assert (step.tokens[:, 2 : 2 + begun] != 8).all(), "the blocks before are whole"
        assert (step.tokens[:, 2 + begun + block :] == 8).all(), "the blocks behind are masks"


def test_llada_refuses_what_does_not_divide():
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="block_length is 3: give a divisor of the answer's 8 tokens"):
        llada_generate(counting, prompt, 8, 8, 3, 8)
    with pytest.raises(ValueError, match="steps is 5: give a multiple of the 2 blocks"):
        llada_generate(counting, prompt, 8, 8, 4, 5)


@pytest.mark.parametrize("confidence", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_dream_reveals_everything_by_its_times(confidence, steps):
    seen: list[DenoisingStep] = []
    options = {"temperature": 0.0, "confidence": confidence, "announce": seen.append}
    found = dream_generate(counting, torch.zeros(2, 2, dtype=torch.int64), 8, 8, steps, **options)
    assert found[:, 2:].tolist() == [[2, 3, 4, 5, 6, 7, 0, 1]] * 2
    left, times = 8, torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
    for step in seen:
        assert (step.tokens == 8).sum(1).tolist() == [left, left]
        left -= int(left * (1 - times[step.index + 1] / times[step.index]))


def test_dream_samples_as_its_generator_says():
    prompt = torch.zeros(4, 2, dtype=torch.int64)

    def flat(tokens):
        return torch.zeros(*tokens.shape, 9).index_fill(-1, torch.tensor(8), -torch.inf)

    def draw(seed):
        return dream_generate(flat, prompt, 8, 8, 4, temperature=1.0, top_p=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    with pytest.raises(ValueError, match="pass a generator"):
        dream_generate(flat, prompt, 8, 8, 4)


def test_shifted_logits_are_about_the_position_itself():
    logits = torch.arange(6.0).reshape(1, 3, 2)
    assert shifted_right(logits)[0, :, 0].tolist() == [0.0, 0.0, 2.0]


# ---- the host


def test_loss_falls_and_answers_are_measured():
    module, text = model(config=LLAMA | {"vocab_size": 40}, answer_length=8, steps=8), TextDataModule(block_size=16, batch_size=8)
    trainer = tiny_trainer(max_steps=30, limit_val_batches=2)
    trainer.fit(module, datamodule=text)
    assert trainer.callback_metrics["language/loss"] < 3.6
    trainer.validate(module, datamodule=text, verbose=False)
    first = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}
    trainer.validate(module, datamodule=text, verbose=False)
    assert first == {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}, "masks stay the same"
    assert 0 <= first["language/val_accuracy"] <= 1
    table = module.dashboard_media()["language/answers"]
    assert all(len(answer) == 8 for _, answer, _ in table.rows)


@pytest.mark.parametrize("config", [LLAMA, MODERNBERT, {"model_type": "bert", "vocab_size": 49, **SIZES}])
def test_the_model_sees_both_sides(config):
    module = model(config=config).eval()
    tokens = torch.randint(0, 48, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 48
    with torch.no_grad():
        assert not torch.allclose(module(tokens)[0, 0], module(changed)[0, 0], atol=1e-6)


def test_predict_generates_and_writes(tmp_path):
    module, text = model(config=LLAMA | {"vocab_size": 40}), TextDataModule(block_size=16, batch_size=4)
    trainer = tiny_trainer(limit_predict_batches=2, default_root_dir=tmp_path)
    (first, _) = trainer.predict(module, datamodule=text)
    lines = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines[:4]] == first["generated"].tolist()
    assert lines[0]["text"] == text.decode(lines[0]["tokens"])


def test_a_killed_run_ends_like_a_whole_one(tmp_path):
    whole, resumed = kill_and_resume(lambda: (model(), data(), [ExactResume()]), 6, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def test_bf16_and_accumulation_train():
    module = model()
    before = cloned_state(module)
    tiny_trainer(max_steps=2, precision="bf16-mixed", accumulate_grad_batches=2).fit(module, datamodule=data())
    assert all(value.isfinite().all() for value in module.state_dict().values())
    with pytest.raises(AssertionError):
        assert_state_dicts_equal(before, module.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": None}, "give one of them"),
        ({"config": {"model_type": "modernbert", "vocab_size": 49}}, "config is {.*vocab_size.*}, which transformers can't build: "),
        ({"config": {"model_type": "vit"}}, "config.model_type is 'vit'"),
        ({"mask_token": 49}, re.escape("mask_token is 49: give one of the model's tokens in [0, 49)")),
        ({"steps": 3, "block_length": 2}, "give a multiple of the 2 blocks"),
        ({"sampler": "other"}, "sampler is 'other': give one of llada, dream"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


def test_data_that_do_not_fit_are_refused():
    text = data()
    text.setup("fit")
    size = text.vocab_size
    with pytest.raises(ValueError, match=f"the data have {size} different tokens, .*vocab_size to {size + 1}, the mask"):
        tiny_trainer(max_steps=1).fit(model(config=LLAMA | {"vocab_size": size}), datamodule=data())
    with pytest.raises(ValueError, match="answer_length is 16, and the sequences have 16 tokens: set it lower"):
        tiny_trainer(max_steps=1).validate(model(answer_length=16, steps=16), datamodule=data())


# ---- folders


def test_a_folder_of_llada_is_read_without_its_code(tmp_path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5}
    made = model(config=LLAMA | rope).eval()
    llada_folder(tmp_path, made.model)
    read = model(config=None, name_or_path=str(tmp_path)).eval()
    assert read.mask_token == 41
    tokens = torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        assert torch.equal(read(tokens), made(tokens))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"n_layers": 2', '"n_layers": 3'))
    with pytest.raises(ValueError, match=r"lacks 9 of the model's weights, such as model.layers.2"):
        model(config=None, name_or_path=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    with pytest.raises(ValueError, match=r"config.json of a LLaDA has no d_model"):
        model(config=None, name_or_path=str(tmp_path))


def test_a_folder_of_dream_shifts_its_logits(tmp_path):
    made = model(config={"model_type": "qwen2", "vocab_size": 49, "num_key_value_heads": 1, **SIZES}, shift=True).eval()
    made.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 40})
    )
    read = model(config=None, name_or_path=str(tmp_path)).eval()
    assert read.shift
    assert read.mask_token == 40
    tokens = torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        assert torch.equal(read(tokens), made(tokens))
        assert torch.equal(read(tokens)[:, 1:], read.model(input_ids=tokens).logits[:, :-1])


# ---- progress


def test_progress_of_a_generation_is_printed(capsys):
    bar = ThroughputProgressBar(plain=True, log_seconds=0.0)
    bar.on_denoise_step(3, 16)
    assert "denoising step 4/16" in capsys.readouterr().out
    bar.log_seconds, bar._line_at = 100.0, time.monotonic()
    bar.on_denoise_step(4, 16)
    assert not capsys.readouterr().out
