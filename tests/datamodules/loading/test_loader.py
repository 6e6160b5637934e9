from __future__ import annotations

import multiprocessing
from itertools import islice

import pytest
import torch

from lit_lora.datamodules import Plan
from lit_lora.datamodules.batches.plan import MAX_PASSES
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.dataset import ShardDataset
from lit_lora.datamodules.loading.loader import PlannedLoader
from lit_lora.datamodules.loading.restarting_loader import RestartingLoader
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.errors import UserError
from tests.datamodules.one_chunk import OneChunk

workers = pytest.mark.parametrize("num_workers", [0, 2])


@pytest.fixture
def dataset(make_shards):
    return _dataset(make_shards(5, 8))


def _dataset(paths):
    table = SampleTable.of([ShardIndex.build(path) for path in paths])
    return ShardDataset(ShardReader(table), ImageDecoder(random_flip=True))


def _plan(num_samples, *args, **options):
    return Plan(OneChunk(num_samples, (8, 8)), *args, **options)


def _seen(batches):
    """All that makes a batch: keys, slots and pixels."""
    return [(batch["key"], batch["slot"], batch["pixel_values"].tolist()) for batch in batches]


@workers
def test_passes_follow_the_plan(dataset, num_workers):
    plan = _plan(13, 3, seed=5)
    loader = PlannedLoader(dataset, plan, num_workers=num_workers)

    assert len(loader) == 4
    for number in range(3):
        batches = list(loader)
        expected, cursor = [], plan.start()._replace(pass_number=number)
        for batch, _ in plan.walk(cursor):
            expected.append(batch)
        assert [batch["key"] for batch in batches] == [[f"{s:04}" for s in e.samples] for e in expected]
        assert [batch["slot"] for batch in batches] == [e.slots.tolist() for e in expected]
        assert all("bad" not in batch for batch in batches)
    loader.close()
    assert multiprocessing.active_children() == []


@workers
@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 6])
def test_resumes_exactly(dataset, num_workers, consumed):
    def make(seed=5):
        return PlannedLoader(dataset, _plan(13, 3, seed), num_workers=num_workers)

    straight = make()
    whole = _seen([*straight, *straight, *straight])
    first = make()
    before = _seen(islice((batch for _ in range(3) for batch in first), consumed))
    state = first.state_dict()
    assert all(type(value) is int for name, value in state.items() if name != "segments")
    assert all(type(value) is int for value in state["segments"])
    second = make()
    second.load_state_dict(state)
    after = _seen(batch for _ in range(3 - consumed // 4) for batch in second)

    assert before + after == whole
    for loader in (straight, first, second):
        loader.close()


@workers
def test_abandoned_iteration_continues(dataset, num_workers):
    loader = PlannedLoader(dataset, _plan(13, 3), num_workers=num_workers)
    whole = _seen(PlannedLoader(dataset, _plan(13, 3)))

    assert _seen(islice(loader, 1)) == whole[:1]
    assert loader.state_dict()["pass_batches"] == 1
    assert _seen(islice(loader, 2)) == whole[1:3]
    assert _seen(loader) == whole[3:]
    assert loader.cursor[:4] == (1, 0, 0, 0)
    loader.close()
    assert multiprocessing.active_children() == []


def test_processes_share_the_global_batch(dataset):
    whole = list(PlannedLoader(dataset, _plan(13, 4)))
    parts = [list(PlannedLoader(dataset, _plan(13, 4), rank, world_size=2)) for rank in range(2)]

    assert len(whole) == 3
    for batch, low, high in zip(whole, *parts, strict=True):
        assert batch["key"] == low["key"] + high["key"]
        assert batch["slot"] == low["slot"] + high["slot"]
        for name in ("pixel_values", "crop_top_left"):
            assert torch.equal(batch[name], torch.cat([low[name], high[name]]))


def test_state_works_with_another_number_of_processes(dataset):
    pair = [PlannedLoader(dataset, _plan(13, 4), rank, world_size=2) for rank in range(2)]
    for loader in pair:
        next(iter(loader))
    assert pair[0].state_dict() == pair[1].state_dict()
    alone = PlannedLoader(dataset, _plan(13, 4))
    alone.load_state_dict(pair[0].state_dict())

    assert _seen(alone) == _seen(PlannedLoader(dataset, _plan(13, 4)))[1:]


@pytest.mark.parametrize(
    ("seed", "samples", "identity", "message"),
    [
        (1, 13, {}, "the checkpoint has seed 0, this run 1; restore seed"),
        (0, 12, {}, "the checkpoint has samples 13, this run 12; use the shards and val_samples of that run"),
        (0, 13, {"shards": 8}, "the checkpoint has shards 7, this run 8; use the shards of that run in the same order"),
    ],
)
def test_state_of_other_data(dataset, seed, samples, identity, message):
    state = PlannedLoader(dataset, _plan(13, 4, 0), identity={"shards": 7}).state_dict()
    with pytest.raises(UserError, match=message):
        PlannedLoader(dataset, _plan(samples, 4, seed), identity={"shards": 7} | identity).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pass", 10**12, r"pass is 1000000000000, but must be an integer in \[0, 1048575\]"),
        ("pass", -1, "pass is -1"),
        ("pass", 1.0, "pass is 1.0"),
        ("pass", True, "pass is True"),
        ("pass", None, "pass is None"),
        ("chunk_position", 1, r"chunk_position is 1, but must be an integer in \[0, 0\]"),
        ("repeat", 2, r"repeat is 2, but must be an integer in \[0, 1\]"),
        ("pass_batches", 2**60, "pass_batches is"),
        ("visit_batches", 2, r"visit_batches is 2, but must be an integer in \[0, 1\]"),
        ("segments", [4], r"segments is \[4\], but must be a list of pairs"),
        ("segments", [4, 1, 4], "a list of pairs"),
        ("segments", [], "a list of pairs"),
        ("segments", "41", "a list of pairs"),
        ("segments", [4, 1] * 1001, "a list of pairs, at most 1000"),
        ("segments", [0, 1], r"a batch of 0 samples, but must be an integer in \[1, 65536\]"),
        ("segments", [10**12, 1], "a batch of 1000000000000 samples"),
        ("segments", [4, -1], "-1 batches"),
        ("segments", [4, "1"], "'1' batches"),
        ("segments", [4, 2], "2 batches in this round, but must be at most 1"),
        ("seed", "0", "the checkpoint has seed 0, this run 0"),
    ],
)
def test_position_out_of_bounds(dataset, name, value, message):
    loader = PlannedLoader(dataset, _plan(13, 4))
    next(iter(loader))
    state = loader.state_dict()
    PlannedLoader(dataset, _plan(13, 4)).load_state_dict(state)
    with pytest.raises(UserError, match=message):
        PlannedLoader(dataset, _plan(13, 4)).load_state_dict(state | {name: value})


def test_a_repeat_whose_slots_would_exceed_64_bits(dataset):
    loader = PlannedLoader(dataset, _plan(13, 4))
    state = loader.state_dict() | {"pass_batches": 2**40, "visit_batches": 2**40}
    most = 2**63 // (13 * MAX_PASSES) - 1
    with pytest.raises(UserError, match=rf"repeat is {most + 1}, but must be an integer in \[0, {most}\]"):
        loader.load_state_dict(state | {"repeat": most + 1})


def test_the_last_position_of_batches_of_one_sample_is_within_bounds(dataset):
    plan = _plan(3, 1, passes_per_chunk=2)
    loader = PlannedLoader(dataset, plan)
    list(islice(loader, 5))
    again = PlannedLoader(dataset, plan)
    again.load_state_dict(loader.state_dict())
    (last,) = _seen(loader)
    assert _seen(again) == [last]


@pytest.mark.parametrize("state", [None, [], 3, "x", {}])
def test_state_that_is_none(dataset, state):
    with pytest.raises(UserError, match=r"must be a dict|the checkpoint has seed None"):
        PlannedLoader(dataset, _plan(13, 4)).load_state_dict(state)


def test_older_checkpoints_have_no_digest_of_the_keys(dataset):
    loader = PlannedLoader(dataset, _plan(13, 4), identity={"keys": 8})
    state = loader.state_dict()
    with pytest.raises(UserError, match=r"the checkpoint has keys 7, this run 8; the shards hold other samples now"):
        loader.load_state_dict(state | {"keys": 7})
    del state["keys"]
    loader.load_state_dict(state)


def test_decoder_that_finds_no_member(dataset):
    class Decoder(type(dataset.decoder)):
        def __call__(self, *args):
            return next(iter(()))

    dataset = ShardDataset(dataset.reader, Decoder())
    for num_workers in (0, 1):
        loader = PlannedLoader(dataset, _plan(13, 4), num_workers=num_workers)
        with pytest.raises(UserError, match="the decoder found no member that it needs"):
            list(loader)
        loader.close()


def test_dataset_that_ends_the_iteration(dataset, monkeypatch):
    def nothing(_):
        raise StopIteration

    monkeypatch.setattr(dataset, "__getitems__", nothing)
    with pytest.raises(AssertionError, match="no batch was read"):
        list(PlannedLoader(dataset, _plan(13, 4)))


def test_another_rule_for_leftovers_is_refused(dataset):
    state = PlannedLoader(dataset, _plan(13, 4)).state_dict()
    with pytest.raises(UserError, match=r"the checkpoint has pads 0, this run 1; restore chunks\.leftovers"):
        PlannedLoader(dataset, _plan(13, 4, leftovers="pad")).load_state_dict(state)


@workers
@pytest.mark.parametrize("other", [1, 2, 5])
def test_resumes_with_another_global_batch(dataset, num_workers, other):
    first = PlannedLoader(dataset, _plan(13, 3, leftovers="pad"), num_workers=num_workers)
    before = list(islice(first, 2))
    second = PlannedLoader(dataset, _plan(13, other, leftovers="pad"), num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert len(second) == 2 + -(-7 // other)
    after = list(second)

    shown = [(key, slot) for b in before + after for key, slot, w in zip(b["key"], b["slot"], b["weight"]) if w]  # noqa: B905
    assert sorted(shown) == [(f"{number:04}", number) for number in range(13)]
    assert all(len(batch["key"]) == other for batch in after)
    assert len(second) == -(-13 // other)
    for loader in (first, second):
        loader.close()


def test_global_generator_is_left_alone(dataset):
    before = torch.get_rng_state()
    list(PlannedLoader(dataset, _plan(13, 4)))
    assert torch.equal(torch.get_rng_state(), before)


@workers
def test_restarting_loader_repeats_the_first_pass(dataset, num_workers):
    loader = RestartingLoader(dataset, _plan(13, 4, shuffle=False, leftovers="pad"), num_workers=num_workers)
    first = list(loader)

    assert sum(batch["weight"].sum() for batch in first) == 13
    assert _seen(islice(loader, 2)) == _seen(first[:2])
    assert _seen(loader) == _seen(loader) == _seen(first)
    loader.close()
    assert multiprocessing.active_children() == []


@pytest.fixture
def damaged(tmp_path, write_tar, encode_image):
    """Ten samples, of which 3 and 6 have no image that can be decoded."""
    members = {}
    for number in range(10):
        members[f"{number}.jpg"] = encode_image()[:-50] if number in (3, 6) else encode_image()
        members[f"{number}.txt"] = b"caption"
    return _dataset([write_tar(tmp_path / "damaged.tar", members)])


@workers
def test_bad_sample_stops_the_run_and_is_named(damaged, num_workers):
    loader = PlannedLoader(damaged, _plan(10, 2, shuffle=False), num_workers=num_workers)
    with pytest.raises(
        UserError, match=r"(?s)1 bad samples, more than max_bad_samples=0.*\n  3 in .*damaged.tar: the image"
    ):
        list(loader)
    assert loader.cursor.pass_batches == 1
    loader.close()
    assert multiprocessing.active_children() == []


@workers
def test_bad_samples_within_the_limit(damaged, num_workers):
    loader = PlannedLoader(damaged, _plan(10, 2, shuffle=False), num_workers=num_workers, max_bad_samples=2)
    with pytest.warns(UserWarning, match="bad sample") as caught:
        batches = [*loader, *loader]

    assert [batch["weight"].tolist() for batch in batches[:5]] == [[1, 1], [1, 0], [1, 1], [0, 1], [1, 1]]
    assert [batch["key"] for batch in batches[:5]] == [["0", "1"], ["2", "2"], ["4", "5"], ["7", "7"], ["8", "9"]]
    assert [str(w.message).split(" in ")[0] for w in caught] == ["bad sample 3", "bad sample 6"]
    loader.close()
    assert multiprocessing.active_children() == []


def test_limit_counts_different_samples(damaged):
    loader = PlannedLoader(damaged, _plan(10, 2, shuffle=False), max_bad_samples=1)
    with (
        pytest.warns(UserWarning, match="bad sample 3"),
        pytest.raises(UserError, match=r"(?s)2 bad samples.*  3 in.*  6 in"),
    ):
        list(loader)
