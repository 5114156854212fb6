"""The label store: generations, shards, broken files, workers that live on, checkpoints."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.label_store import LabelStore


def annotations():
    """Three images of unequal sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 4, size).astype(np.uint8) for size in ((3, 4), (2, 2), (5, 1))]


@pytest.fixture
def store(tmp_path):
    return LabelStore.create(tmp_path / "labels", annotations())


def correct(store, new, shard=0, **kwargs):
    store.clear_next()
    with store.writer(shard) as writer:
        for index, labels in new.items():
            writer.write(index, labels)
    return store.publish(**kwargs)


def test_original_and_current_labels(store):
    for index, expected in enumerate(annotations()):
        assert np.array_equal(store.original(index), expected)
        assert np.array_equal(store.current(index), expected)
    new = np.full((2, 2), 255)
    assert correct(store, {1: new}) == store.generation == 1
    assert np.array_equal(store.current(1), new)
    assert np.array_equal(store.original(1), annotations()[1]), "the annotation stays"
    assert store.changed() == [1]
    correct(store, {0: np.zeros((3, 4))})
    assert store.changed() == [0], "who isn't written has its original labels again"
    correct(store, {2: np.ones((5, 1))}, keep=[0, 2])
    assert store.changed() == [0, 2]
    assert not store.current(0).any()
    store.reset()
    assert store.changed() == []
    assert len(list(store.folder.glob("corrected-*"))) <= 2, "old generations are removed"


def test_another_reader_sees_a_whole_generation_or_nothing(store):
    reader = pickle.loads(pickle.dumps(store))
    store.clear_next()
    with store.writer(0) as writer:
        writer.write(0, np.zeros((3, 4)))
        assert np.array_equal(reader.current(0), annotations()[0]), "nothing is seen before it is published"
    with store.writer(1) as writer:
        writer.write(2, np.ones((5, 1)))
    assert np.array_equal(reader.current(2), annotations()[2])
    store.publish()
    assert not reader.current(0).any()
    assert reader.current(2).all()


def broken_pass(store):
    with store.writer(0) as writer:
        writer.write(0, np.zeros((3, 4)))
        raise RuntimeError("stop")


def test_a_pass_that_broke_off_leaves_nothing(store):
    with pytest.raises(RuntimeError, match="stop"):
        broken_pass(store)
    store.publish()
    assert store.changed() == []


class Labels(Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return torch.from_numpy(self.store.current(index)).flatten().long().sum()


def test_persistent_workers_see_new_labels(store):
    loader = DataLoader(Labels(store), num_workers=1, persistent_workers=True)
    before = [int(batch) for batch in loader]
    correct(store, {0: np.full((3, 4), 3), 1: np.zeros((2, 2))})
    after = [int(batch) for batch in loader]
    assert before == [int(one.sum()) for one in annotations()]
    assert after == [36, 0, before[2]]


@pytest.mark.parametrize("name", ["original.bin", "corrected-00000001/shard-00000.bin"])
def test_a_truncated_file_is_named(store, name):
    correct(store, {0: np.zeros((3, 4))})
    path = store.folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BrokenRecordError, match=rf"{path.name}: labels: \d+ bytes instead of \d+: truncated"):
        LabelStore(store.folder).current(0)


def test_missing_and_unreadable_parts_are_named(store):
    (store.folder / "store.json").write_text("{")
    with pytest.raises(BrokenRecordError, match=r"store.json: file: no valid JSON"):
        LabelStore(store.folder)
    with pytest.raises(FileNotFoundError, match=r"store.json"):
        LabelStore(store.folder / "nowhere")


def test_what_systems_and_kills_leave_in_the_folder_blocks_no_start(store):
    for name in (".DS_Store", "._original.bin", "Thumbs.db", "original.bin.part", ".original.bin.4711.tmp"):
        (store.folder / name).write_bytes(b"x")
    (store.folder / "next").mkdir()
    (store.folder / "next" / "shard-00000.bin").write_bytes(b"half")
    again = LabelStore.create(store.folder, annotations())
    assert again.changed() == []
    assert not (store.folder / "original.bin.part").exists()
    (store.folder / "corrected-backup").mkdir()  # somebody's copy
    assert correct(again, {1: np.zeros((2, 2))}) == 1
    assert LabelStore(store.folder).changed() == [1]


def test_damaged_labels_are_refused_by_their_checksum(store):
    path = store.folder / "original.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenRecordError, match=r"original\.bin: checksum: \d+ instead of \d+: .*remove the store's folder"):
        LabelStore(store.folder)
    assert len(pickle.loads(pickle.dumps(store))) == 3, "a worker doesn't read everything again"


@pytest.mark.parametrize("content", [b"", b"\x03\x00", b"\x00" * 8, b"\xff" * 8, b"\x01" + b"\x00" * 7])
def test_a_damaged_generation_is_never_taken_as_no_corrections(store, content):
    for value in (1, 2, 3):
        correct(store, {0: np.full((3, 4), value)})
    (store.folder / "generation.bin").write_bytes(content)
    with pytest.raises(BrokenRecordError, match=r"generation\.bin: .*(emove the store's folder)"):
        LabelStore(store.folder)


def test_a_generation_that_was_written_and_not_switched_to_is_not_read(store):
    correct(store, {0: np.full((3, 4), 1)})
    correct(store, {0: np.full((3, 4), 2)})
    (store.folder / "generation.bin").write_bytes(np.array([1], "<i8").tobytes())  # a kill between rename and switch
    again = LabelStore(store.folder)
    assert (again.current(0) == 1).all()
    assert correct(again, {1: np.zeros((2, 2))}) == 2
    assert again.changed() == [1]


@pytest.mark.parametrize("name", ["shards.json", "shard-00000.json", "shard-00000.bin"])
def test_labels_that_can_not_be_read_give_way_to_those_before_them(store, name):
    for value in (1, 2, 3):
        correct(store, {0: np.full((3, 4), value)})
    path = store.folder / "corrected-00000003" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"corrected-00000003 can't be read, .*corrected-00000002.*{name}"):
        again = LabelStore(store.folder)
    assert (again.current(0) == 2).all()
    assert again.generation == store.generation == 2, "every process reads the same"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (LabelStore(store.folder).current(0) == 2).all(), "it is said once"
    assert correct(again, {0: np.full((3, 4), 4)}) == 3
    assert (again.current(0) == 4).all()
    for generation in (2, 3):
        (store.folder / f"corrected-0000000{generation}" / name).unlink()
    with pytest.raises(MissingFileError, match=name):  # neither of them
        LabelStore(store.folder).current(0)


def test_wrong_labels_are_refused(store):
    for labels, problem in ((np.zeros((4, 3)), r"\(4, 3\)"), (np.full((3, 4), 256), "from 256 to 256"), (np.full((3, 4), -1), "-1")):
        with pytest.raises(ValueError, match=problem), store.writer(0) as writer:
            writer.write(0, labels)
    with pytest.raises(ValueError, match="image 0"):
        LabelStore.create(store.folder, [np.full((2, 2), 300)])
    (store.folder / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"has thesis\.tex in it"):
        LabelStore.create(store.folder, annotations())
    assert (store.folder / "thesis.tex").is_file()


def test_a_checkpoint_brings_the_labels_back(store, tmp_path):
    new = np.arange(12).reshape(3, 4)
    correct(store, {0: new, 2: np.full((5, 1), 7)})
    torch.save(store.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = LabelStore.create(tmp_path / "other", annotations())
    correct(other, {1: np.ones((2, 2))})  # what a later correction of the killed run left
    other.load_state_dict(state)
    assert other.changed() == [0, 2]
    assert np.array_equal(other.current(0), new)
    assert (other.current(2) == 7).all()
    strange = LabelStore.create(tmp_path / "strange", annotations()[::-1])
    with pytest.raises(ValueError, match="other annotations"):
        strange.load_state_dict(state)
