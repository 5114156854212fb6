"""S2FT on modules that aren't ours: permutation, what is trained and kept, deltas, resume, two processes."""

import copy
import json
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import assert_state_dicts_equal, cloned_state, fingerprint, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods.callbacks import S2FT, EMATeacher, ExactResume
from lit_methods.callbacks.fine_tuning.delta import Entry, base_hash, fuse, load_delta, save_delta, switch, unfuse
from lit_methods.callbacks.fine_tuning.s2ft import core
from lit_methods.callbacks.fine_tuning.s2ft.couplings import Coupling, found_groups
from lit_methods.callbacks.fine_tuning.s2ft.serving import serving
from lit_methods.datamodules.loaders import make_loader

ALL = {"v_ratio": 0.5, "o_ratio": 0.5, "d_ratio": 0.25, "u_ratio": 0.2}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(kv: int = 2, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=kv, **SMALL, **config))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=16, **dropout))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **SMALL)).eval()


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=3)


def gated() -> nn.Module:
    """An MLP whose layers have names of its own."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.ModuleDict({"a": nn.Linear(6, 10), "b": nn.Linear(6, 10), "c": nn.Linear(10, 6)}) for _ in range(2)))


class Host(pl.LightningModule):
    """Trains any of these on what ``inputs`` gives."""

    def __init__(self, model: nn.Module, lr: float = 0.01) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def run(self, x: Tensor) -> Tensor:
        if isinstance(self.model, nn.Sequential):
            for block in self.model:
                x = x + block["c"](block["a"](x).tanh() * block["b"](x))
            return x
        output = self.model(x)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.run(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)


MODELS = {"llama": llama, "llama_mha": lambda: llama(4), "gpt2": gpt2, "bert": bert, "vit": vit, "timm_vit": timm_vit}


def inputs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if "vit" in name:
        return torch.randn(4, 3, 8, 8, generator=generator)
    return torch.randint(20, (4, 7), generator=generator)


def samples(name: str, number: int = 2) -> DataLoader:
    return DataLoader([inputs(name)] * number, batch_size=None)  # type: ignore[arg-type]


class At(pl.Callback):
    """Calls a function at the end of a batch."""

    def __init__(self, act: Any, batch: int = 0) -> None:
        self.act, self.batch = act, batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.act(pl_module)


class AtStart(pl.Callback):
    def __init__(self, act: Any) -> None:
        self.act = act

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.act(pl_module)


def fit(model: Any, callback: pl.Callback | list[pl.Callback], data: Any, **options: Any) -> Host:
    module = model if isinstance(model, pl.LightningModule) else Host(model)
    callbacks = callback if isinstance(callback, list) else [callback]
    tiny_trainer(max_epochs=1, limit_val_batches=0, callbacks=callbacks, **options).fit(module, data)
    return module


# ---- selection and order ---------------------------------------------------------------------------------------------------------------


def test_the_budget_is_counted_over_all_layers():
    chosen = core.select_units([8, 8, 8], 0.3, torch.Generator().manual_seed(0))
    assert sum(map(len, chosen)) == 7  # int(24 x 0.3)
    assert all((part.diff() > 0).all() for part in chosen)
    assert [len(part) for part in core.select_units([4, 4], 0.0)] == [0, 0]
    assert [len(part) for part in core.select_units([4, 4], 1.0)] == [4, 4]
    assert core.select_units([], 0.5) == []


def test_scores_choose_the_largest_or_the_smallest_of_the_whole_model():
    scores = [torch.tensor([1.0, 9.0, 3.0, 3.0]), torch.tensor([8.0, 3.0, 0.5, 2.0])]
    assert [part.tolist() for part in core.select_units([4, 4], 0.5, scores=scores)] == [[1, 2, 3], [0]]  # ties: the first ones
    assert [part.tolist() for part in core.select_units([4, 4], 0.5, scores=scores, largest=False)] == [[0, 2], [2, 3]]


def test_a_layout_has_both_selections_in_one_piece():
    order, (c0, c1), (r0, r1) = core.unit_layout(8, torch.tensor([5, 2, 7]), torch.tensor([7, 0, 2]))
    assert order.tolist() == [5, 2, 7, 0, 1, 3, 4, 6]
    assert sorted(order[c0:c1].tolist()) == [2, 5, 7]
    assert sorted(order[r0:r1].tolist()) == [0, 2, 7]
    assert core.expanded(torch.tensor([1, 0]), 2, 2).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


@pytest.mark.parametrize("kind", ["row", "column"])
def test_the_layer_has_the_gradients_of_the_plain_formula(kind):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5).double(), torch.randn(6).double()
    delta = torch.randn((6, 2) if kind == "row" else (2, 5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, delta: core.s2_linear(x, weight, delta, 1, kind, bias), (x, delta))
    for shape in ((5,), (4, 5), (0, 5), (2, 2, 2, 5)):
        y = core.s2_linear(torch.ones(shape).double(), weight, delta, 1, kind, bias)
        torch.testing.assert_close(y, torch.ones(shape).double() @ core.fused_weight(weight, delta, 1, kind).T + bias)


def test_only_the_slice_is_saved_for_the_backward_pass():
    x, weight = torch.randn(32, 100, requires_grad=True), torch.randn(50, 100)
    delta, kept = torch.zeros(50, 3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        core.s2_linear(x, weight, delta, 10, "row")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t is not weight and t is not delta}
    storages.pop(weight.data_ptr(), None)
    storages.pop(delta.data_ptr(), None)
    assert sum(storages.values()) == 32 * 3 * 4


# ---- any transformer -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_permutation_leaves_the_function_and_training_only_what_was_chosen(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().double().eval(), inputs(name)
    x = x.double() if x.is_floating_point() else x
    module = Host(model)
    before, start, seen = cloned_state(model), module.run(x).detach(), {}

    def look(pl_module: Any) -> None:
        pl_module.eval()
        seen["output"] = pl_module.run(x).detach()
        seen["state"] = cloned_state(pl_module.model)
        seen["order"] = {key: value.detach().clone() for key, value in pl_module.model.named_parameters()}

    s2ft = S2FT(**ALL)
    fit(module, [s2ft, AtStart(look)], DataLoader([x] * 2, batch_size=None), precision="64-true")  # type: ignore[arg-type]
    torch.testing.assert_close(seen["output"], start, rtol=0, atol=1e-12)
    assert_state_dicts_equal(seen["state"], before)  # in the original order, whatever the module's own is
    assert any(not torch.equal(seen["order"][key], before[key]) for key in before if key in seen["order"]), "nothing was permuted"
    after, delta = cloned_state(model), s2ft.delta()
    assert set(delta.entries) <= set(before)
    for key, value in after.items():
        changed = (value != before[key]).nonzero()
        entry = delta.entries.get(key)
        if entry is None:
            assert not len(changed), f"{key} has changed"
        else:
            assert set(changed[:, entry.dim].tolist()) == set(entry.index.tolist()), key
    assert len(delta.entries) >= 6


@pytest.mark.parametrize("name", MODELS)
def test_a_delta_on_a_new_base_is_the_trained_model(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    base = copy.deepcopy(model)
    s2ft = S2FT(**ALL)
    fit(model, s2ft, samples(name))
    path = s2ft.save_delta(tmp_path / "deltas" / "one.safetensors")
    before = cloned_state(base)
    fused = fuse(base, load_delta(path))
    assert_state_dicts_equal(cloned_state(base), cloned_state(model))
    unfuse(base, fused)
    assert_state_dicts_equal(cloned_state(base), before)


def test_layers_that_a_permutation_would_mix_up_are_left_out():
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Olmo2ForCausalLM"):
        pytest.skip("this transformers has no OLMo 2")
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(vocab_size=20, num_key_value_heads=4, pad_token_id=0, **SMALL))
    groups, left = found_groups(model)
    assert {group.unit for group in groups} == {"channel"}
    assert all("q_norm" in why for why in left.values()), left
    with pytest.warns(UserWarning, match="may belong to single heads"), pytest.raises(ValueError, match="no heads are found in Host"):
        fit(model, S2FT(o_ratio=0.5), samples("llama"))


def test_grouped_queries_are_permuted_by_groups():
    groups, left = found_groups(llama())
    assert not left
    assert [(group.unit, group.units) for group in groups[:2]] == [("head", 2), ("channel", 24)]


def test_torch_attention_is_no_place_for_a_slice():
    module = Host(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True))
    with pytest.raises(ValueError, match=r"S2FT: no channels are found in Host.*couplings"):
        fit(module, S2FT(), DataLoader([torch.randn(2, 3, 16)], batch_size=None))  # type: ignore[arg-type]
    couplings = [Coupling("model.linear2", ["model.linear1"])]
    fit(module, S2FT(d_ratio=0.5, couplings=couplings), DataLoader([torch.randn(2, 3, 16)], batch_size=None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'model.self_attn.out_proj'.*name linear layers"):
        fit(module, S2FT(d_ratio=0.5, couplings=[Coupling("*.out_proj", ["model.linear1"])]), samples("llama"))


# ---- the callback ----------------------------------------------------------------------------------------------------------------------

CHAINS = [Coupling("model.*.c", ["model.*.b", "model.*.a"])]


class Rows(torch.utils.data.Dataset):
    """Twelve samples, asked for by (epoch, index)."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(key[1]))


def rows(number: int = 12) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(torch.randn(number, 6, generator=generator), batch_size=3)  # type: ignore[arg-type]


def given(**options: Any) -> S2FT:
    return S2FT(**{"d_ratio": 0.2, "u_ratio": 0.2, "couplings": CHAINS} | options)


@pytest.mark.parametrize("strategy", ["R", "W", "A", "S", "G"])
@pytest.mark.parametrize("largest", [True, False])
def test_strategies(strategy, largest):
    s2ft, module = given(strategy=strategy, largest=largest, u_ratio=0.1), Host(gated())
    with torch.no_grad():
        for block in module.model:
            block["b"].weight[4] *= 50  # a channel whose output and gradient are far the largest
            block["c"].weight[:, 4] *= 50
    before = cloned_state(module)
    seen = {}
    fit(module, [s2ft, AtStart(lambda _: seen.update(copy.deepcopy(s2ft._chosen)))], rows())
    assert set(seen) == {"model.0.c", "model.1.c"}
    assert sum(len(row) for _, row in seen.values()) == 4
    if strategy != "R":
        assert any(4 in row for _, row in seen.values()) is largest
        assert any(4 in column for column, _ in seen.values()) is largest
    assert any(not torch.equal(value, before[name]) for name, value in cloned_state(module).items())


def test_a_killed_run_neither_draws_again_nor_permutes_twice(tmp_path):
    seeds = iter(range(100))  # every process builds other weights and would draw others

    def build() -> tuple[Any, Any, list[pl.Callback]]:
        module = Host(gated())
        if (seed := next(seeds)) == 2:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(1.0)
        return module, make_loader(Rows(), batch_size=3, shuffle=True, seed=0), [given(seed=seed if seed == 2 else 0), ExactResume()]

    whole, resumed = kill_and_resume(build, 4, 2, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def test_nothing_is_left_behind():
    assert left_behind(lambda: Host(gated()), given, rows(6), max_steps=0) == {}

    def fail(pl_module: Any) -> None:
        raise RuntimeError("on purpose")

    modules = [Host(gated()), Host(gated())]
    fit(modules[0], given(), rows(6))
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(modules[1], [given(), At(fail)], rows(6))
    for module in modules:
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert fingerprint(module.model) == fingerprint(gated())


def in_two_processes(devices: int) -> tuple[dict[str, Tensor], str]:
    module, s2ft = Host(gated()), given(strategy="S")
    loader = make_loader(Rows(), batch_size=4 // devices, shuffle=False, seed=0)
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    fit(module, s2ft, loader, **options)
    return cloned_state(module), s2ft.delta().base


def test_two_processes_end_like_one():
    (first, base), (second, _) = run_two_processes(in_two_processes, 2)
    assert_state_dicts_equal(first, second)
    alone, own = in_two_processes(1)
    assert base == own
    assert_state_dicts_equal(first, alone, atol=1e-6)


def test_accumulation_bf16_and_a_teacher():
    s2ft, teacher = given(), EMATeacher(decay=0.5)
    module = fit(gated(), [s2ft, teacher], rows(), precision="bf16-mixed", accumulate_grad_batches=2)
    assert s2ft.delta().numel > 0
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in module.state_dict().values())


def test_a_second_fit_is_another_fine_tuning():
    s2ft, module = given(), Host(gated())
    fit(module, s2ft, rows())
    first, base = s2ft.delta(), copy.deepcopy(module.model)
    fit(module, s2ft, rows())
    second = s2ft.delta()
    assert second.base == base_hash(base) != first.base
    fuse(base, second)
    assert_state_dicts_equal(cloned_state(base), cloned_state(module.model))


def test_a_new_head_is_trained_beside_the_slices():
    class WithHead(Host):
        def __init__(self) -> None:
            super().__init__(gated())
            self.head = nn.Linear(6, 2)

        def run(self, x: Tensor) -> Tensor:
            return self.head(super().run(x))

    module = WithHead()
    base, s2ft = copy.deepcopy(module), given(also=["head"])
    fit(module, s2ft, rows())
    assert not torch.equal(base.head.weight, module.head.weight)
    fuse(base, s2ft.delta())
    assert_state_dicts_equal(cloned_state(base), cloned_state(module))


def test_the_share_that_is_trained_is_small():
    module, s2ft = Host(gated()), given(u_ratio=0.0)
    seen = {}
    fit(module, [s2ft, AtStart(lambda own: seen.update(summary=ModelSummary(own).trainable_parameters, counts=s2ft.counts()))], rows())
    assert seen["summary"] == seen["counts"][0] == 4 * 6  # int(20 x 0.2) channels of 6 outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ratio": 1.5}, r"d_ratio is 1.5: give a share"),
        ({"d_ratio": 0.0, "u_ratio": 0.0}, r"all ratios are 0"),
        ({"strategy": "X"}, r"strategy is 'X'"),
        ({"targets": "abc"}, r"targets is the string"),
        ({"seed": -1}, r"seed is -1"),
        ({"calibration_batches": 0}, r"calibration_batches is 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        given(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["nowhere"]}, r"S2FT: targets=.*'nowhere' matches no layer.*model.0.c"),
        (
            {"couplings": [Coupling("nowhere", ["a"])]},
            r"S2FT: the consumer 'nowhere' matches no submodule of Host; linear ones are model.0.a",
        ),
        ({"couplings": [Coupling("model.*.c", ["model.*.d"])]}, r"'model.0.d'.*is missing: name linear layers"),
        ({"couplings": [Coupling("model.*.c", ["model.*.a"], heads=3)]}, r"model.0.c has 10 inputs, which 3 units don't divide"),
        ({"d_ratio": 0.01, "u_ratio": 0.0}, r"the ratios come to nothing of 0 heads and 20 channels"),
        ({"root": "nowhere"}, r"root='nowhere' is no submodule of Host; its children are model"),
        ({"also": ["model.0.c"]}, r"model.0.c.weight is trained in part, and whole by also"),
        ({"o_ratio": 0.5}, r"no heads are found in Host"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(gated(), given(**options), rows())


def test_an_optimiser_without_the_slices_is_refused():
    class Own(Host):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.model[0]["a"].weight], lr=0.1)

    with pytest.raises(ValueError, match=r"S2FT: no optimiser holds the trained values of model.0.b.weight"):
        fit(Own(gated()), given(), rows())


def test_training_data_that_are_empty():
    with pytest.raises(ValueError, match=r"S2FT: this strategy needs a training batch, but the training data are empty"):
        fit(gated(), given(strategy="A"), DataLoader([]))  # type: ignore[arg-type]


# ---- deltas ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_deltas() -> tuple[nn.Module, Any, Any]:
    base = gated()
    made = []
    for seed in (0, 1):
        s2ft = given(seed=seed)
        fit(copy.deepcopy(base), s2ft, rows())
        made.append(s2ft.delta())
    return base, *made


def test_deltas_switch_and_add_up(two_deltas):
    base, one, two = two_deltas
    start = cloned_state(base)
    fused = fuse(base, one)
    alone = cloned_state(base)
    fused = switch(base, fused, two)
    fused = switch(base, fused, one)
    assert_state_dicts_equal(cloned_state(base), alone)
    fused = switch(base, fused, one, two, weights=[0.5, 2.0])
    for name, value in base.named_parameters():
        wanted = start[name].clone()
        for delta, factor in ((one, 0.5), (two, 2.0)):
            if (entry := delta.entries.get(name)) is not None:
                wanted.index_add_(entry.dim, entry.index, factor * entry.values)
        torch.testing.assert_close(value.detach(), wanted)
    unfuse(base, fused)
    assert_state_dicts_equal(cloned_state(base), start)


def test_a_delta_of_another_base_is_refused(two_deltas, tmp_path):
    base, one, _ = two_deltas
    path = save_delta(one, tmp_path / "one.safetensors")
    with torch.no_grad():
        base[1]["a"].bias[0] += 1e-3
    state = cloned_state(base)
    with pytest.raises(ValueError, match=r"the delta is of another base model: its SHA-256 is"):
        fuse(base, load_delta(path))
    assert_state_dicts_equal(cloned_state(base), state)
    with pytest.raises(ValueError, match=r"Linear has no parameter '0.b.weight' of this delta"):
        fuse(nn.Linear(3, 3), one)
    with pytest.raises(ValueError, match=r"weights has 1 numbers for 2 deltas"):
        fuse(base, one, one, weights=[1.0])


def test_a_delta_that_is_fused_twice_is_refused(two_deltas):
    base, one, _ = two_deltas
    fuse(base, one)
    with pytest.raises(ValueError, match=r"unfuse other deltas first"):
        fuse(base, one)


def test_damaged_files_are_named(two_deltas, tmp_path):
    path = save_delta(two_deltas[1], tmp_path / "one.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_delta(tmp_path / "two.safetensors")
    about = path.with_name("one.safetensors.json")
    good = about.read_text()
    about.write_text(json.dumps(json.loads(good) | {"format": "other"}))
    with pytest.raises(ValueError, match="isn't the description of a delta"):
        load_delta(path)
    about.write_text(json.dumps(json.loads(good) | {"entries": {}}))
    with pytest.raises(ValueError, match="name other parameters"):
        load_delta(path)
    about.write_text(good)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="can't be read as a delta"):
        load_delta(path)


def test_positions_replace_bit_for_bit():
    weight = torch.randn(3, 4).to(memory_format=torch.contiguous_format)
    entry = Entry(torch.tensor([1, 7]), torch.tensor([5.0, 6.0]), replaces=True)
    entry.write(weight, entry.values)
    assert weight.flatten()[[1, 7]].tolist() == [5.0, 6.0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_base_serves_several_deltas_in_one_batch(name):
    torch.manual_seed(0)
    base, x, deltas = MODELS[name]().eval(), inputs(name), []
    for seed, options in enumerate([ALL, {"d_ratio": 0.1, "o_ratio": 0.3}, {"d_ratio": 0.0, "u_ratio": 0.2}]):
        model, s2ft = copy.deepcopy(base), S2FT(**options, seed=seed)
        fit(model, s2ft, samples(name, 1))
        deltas.append(s2ft.delta())
    which, wanted = [2, -1, 0, 1], []
    with torch.no_grad():
        for number, request in zip(which, x, strict=True):
            fused = fuse(base, *([deltas[number]] if number >= 0 else []))
            wanted.append(base(request[None]).logits)
            unfuse(base, fused)
        with serving(base, deltas) as serve:
            with pytest.raises(ValueError, match="nothing was chosen for a batch of 4 requests"):
                base(x)
            serve(which)
            torch.testing.assert_close(base(x).logits, torch.cat(wanted), rtol=0, atol=1e-5)
            with pytest.raises(ValueError, match="give numbers of 3 deltas from 0"):
                serve([3])
        torch.testing.assert_close(base(x[1:2]).logits, wanted[1])  # nothing is left


def test_positions_cannot_be_served(two_deltas):
    base, one, _ = two_deltas
    single = replace(one, entries={"0.c.weight": Entry(torch.tensor([1]), torch.tensor([1.0]), replaces=True)})
    with pytest.raises(ValueError, match=r"0.c.weight can't be served side by side.*fuse the delta"), serving(base, [single]):
        pass
