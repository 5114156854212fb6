"""Latents in tar files: reading, damage, order, resuming, the built-in sample."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_methods.datamodules import LatentShardsDataModule
from lit_methods.datamodules.generative.fake import shards
from lit_methods.datamodules.generative.shards import built_in_shards, read_index, write_shard


def latent(number: int) -> Tensor:
    return torch.full((4, 2, 6, 6), float(number))


def module(root: Path | None, **settings) -> LatentShardsDataModule:
    found = LatentShardsDataModule(root, **({"num_val": 2, "batch_size": 2, "val_batch_size": 2} | settings))
    found.prepare_data()
    found.setup("fit")
    return found


def test_batches_hold_latents_and_prompts_of_the_same_samples(tmp_path):
    data = module(shards(tmp_path), scale=0.5)
    seen = []
    for batch in data.train_dataloader():
        assert batch["image"].shape == (2, 4, 2, 6, 6)
        assert batch["image"].dtype == batch["prompt"].dtype == torch.float32
        numbers = batch["prompt"][:, 0, 0]
        torch.testing.assert_close(batch["image"], 0.5 * torch.stack([latent(int(n)) for n in numbers]))
        seen += numbers.int().tolist()
    assert sorted(seen) == list(range(8))
    assert seen != sorted(seen), "not shuffled"
    assert [n for batch in data.val_dataloader() for n in batch["prompt"][:, 0, 0].int().tolist()] == [8, 9]


def test_prompts_are_filled_up_and_the_negative_one_is_there(tmp_path):
    torch.save(torch.full((1, 2, 8), 7.0), tmp_path / "negative.pt")
    data = module(shards(tmp_path), tokens=5, null_embedding=tmp_path / "negative.pt")
    batch = next(iter(data.val_dataloader()))
    assert batch["prompt"].shape == batch["null_prompt"].shape == (2, 5, 8)
    assert batch["prompt"][0, :, 0].tolist() == [8, 8, 8, 0, 0]
    assert batch["null_prompt"][1, :, 0].tolist() == [7, 7, 0, 0, 0]
    with pytest.raises(ValueError, match=r"0008.embed.pth is \(3, 8\).*tokens=2"):
        next(iter(module(tmp_path, tokens=2).val_dataloader()))


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def order(batches) -> list[int]:
        return [n for batch in batches for n in batch["prompt"][:, 0, 0].int().tolist()]

    loader = module(shards(tmp_path)).train_dataloader()
    batches = iter(loader)
    first = order([next(batches)])
    state = loader.state_dict()
    rest = order(batches)
    again = module(tmp_path).train_dataloader()
    again.load_state_dict(state)
    assert order(again) == rest
    assert sorted(first + rest) == list(range(8))


@pytest.mark.parametrize("keep", [0.97, 0.6, 0.5, 0.1])
def test_a_truncated_file_is_named(tmp_path, keep):
    whole = shards(tmp_path) / "shard-1.tar"
    content = whole.read_bytes()
    whole.write_bytes(content[: int(keep * len(content.rstrip(b"\0")))])
    with pytest.raises(ValueError, match=r"shard-1\.tar.*(truncated|has no embed)"):
        module(tmp_path)


def test_a_file_without_its_end_is_truncated(tmp_path):
    shard = shards(tmp_path, per_shard=1) / "shard-0.tar"
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 512])
    with pytest.raises(ValueError, match=r"shard-0\.tar: file: is truncated"):
        read_index(shard, ["latent.pth"])


def test_something_else_than_a_tar_file_is_named(tmp_path):
    (tmp_path / "shard-0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"shard-0\.tar: file: can't be read as a tar file"):
        module(tmp_path)


class Harm:
    """What a file could hold that runs code when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("harm-was-done"),))


@pytest.mark.parametrize("content", [pickle.dumps(Harm()), b"no tensor", b""], ids=["code", "text", "nothing"])
def test_what_is_no_tensor_is_named_and_no_code_runs(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for key in ("a", "b"):
            member = tarfile.TarInfo(f"{key}.latent.pth")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = module(tmp_path, embedding=None, num_val=1, batch_size=1)
    with pytest.raises(ValueError, match=r"shard-0\.tar: a\.latent\.pth: can't be read as a tensor"):
        next(iter(data.train_dataloader()))
    assert not Path("harm-was-done").exists()


def broken(root: Path, part: dict[str, object]) -> LatentShardsDataModule:
    good = {"latent.pth": latent(0), "embed.pth": torch.zeros(3, 8)}
    write_shard(root / "shard-0.tar", [("good", good), ("bad", good | part), ("last", good)])
    return module(root, num_val=1)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"latent.pth": torch.zeros(4, 2, 6, 5)}, r"(bad|good)\.latent\.pth is .*a batch needs one shape"),
        ({"latent.pth": torch.full((4, 2, 6, 6), torch.nan)}, r"bad\.latent\.pth: has numbers that aren't finite"),
        ({"embed.pth": torch.zeros(8)}, r"bad\.embed\.pth is \(8,\): give \(L, D\)"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, part, words):
    with pytest.raises(ValueError, match=rf"shard-0\.tar: {words}"):
        next(iter(broken(tmp_path, part).train_dataloader()))


def test_a_sample_without_a_part_and_too_few_samples_are_refused(tmp_path):
    write_shard(tmp_path / "shard-0.tar", [("a", {"latent.pth": latent(0)})])
    with pytest.raises(ValueError, match=r"sample 'a': has no embed\.pth, it has latent\.pth"):
        module(tmp_path)
    with pytest.raises(ValueError, match="1 samples: set num_val=2"):
        module(tmp_path, embedding=None)
    with pytest.raises(FileNotFoundError, match=r"has no other\*\.tar"):
        module(tmp_path, pattern="other*.tar")
    write_shard(tmp_path / "shard-0.tar", [(key, {"latent.pth": latent(0)}) for key in "abc"])
    with pytest.raises(FileNotFoundError, match="null_embedding"):
        module(tmp_path, embedding=None, null_embedding=tmp_path / "no.pt")
    with pytest.raises(ValueError, match=r"'a\.b' has a dot"):
        write_shard(tmp_path / "shard-1.tar", [("a.b", {})])


def test_keys_of_two_folders_are_two_samples(tmp_path):
    write_shard(tmp_path / "shard-0.tar", [("x/0", {"latent.pth": latent(0)}), ("y/0", {"latent.pth": latent(1)})])
    assert [record.key for record in read_index(tmp_path / "shard-0.tar", ["latent.pth"])] == ["x/0", "y/0"]


def test_the_built_in_sample_is_made_once_and_has_unit_scale(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path))
    data = module(None, batch_size=56, num_val=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (56, 4, 2, 8, 8)
    assert batch["prompt"].shape == (56, 6, 16)
    assert 0.7 < batch["image"].std() < 1.4
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert len(times) == 2
    assert built_in_shards().is_relative_to(tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert len(list(data.predict_dataloader())) == 4
