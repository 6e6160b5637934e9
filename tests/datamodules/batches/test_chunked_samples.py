from __future__ import annotations

import numpy as np
import pytest

from lit_lora.datamodules.batches import chunked_samples
from lit_lora.datamodules.batches.buckets import AspectRatioBuckets, Bucketing
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.batches.listed_samples import ListedSamples
from lit_lora.datamodules.batches.repeats import Repeats
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.table import SampleTable


@pytest.fixture
def table(tmp_path, write_tar, encode_image):
    """Six shards of five samples: a square, a wide, a tall, a small and a damaged one."""
    paths = []
    for shard in range(6):
        sizes = {"square": (70, 70), "wide": (130, 64), "tall": (64, 130), "small": (20, 20)}
        members = {}
        for name, (width, height) in sizes.items():
            members[f"{shard}-{name}.jpg"] = encode_image(width, height)
            members[f"{shard}-{name}.txt"] = b"x"
        members[f"{shard}-bad.jpg"] = b"nothing"
        members[f"{shard}-bad.txt"] = b"x"
        paths.append(write_tar(tmp_path / f"{shard}.tar", members))
    return SampleTable.of([ShardIndex.build(path) for path in paths])


BUCKETS = AspectRatioBuckets(divisor=16, max_aspect_ratio=2.0)


@pytest.mark.parametrize("bucketing", [Bucketing.of(64, None), Bucketing.of(64, BUCKETS), Bucketing.of(64, BUCKETS, 2)])
@pytest.mark.parametrize("held_out", [[], [0, 7, 29]])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_counts_are_those_of_the_samples(table, bucketing, held_out, block, monkeypatch):
    monkeypatch.setattr(chunked_samples, "_BLOCK", block)
    chunks = ChunkedSamples.split(table, bucketing, 3, seed=1, held_out=np.array(held_out, np.int64))
    small = (
        {sample for sample in range(30) if table.image_size(sample) == (20, 20)} if bucketing.max_upscaling else set()
    )

    seen = []
    for chunk in range(3):
        samples, buckets = chunks.samples(chunk)
        assert np.bincount(buckets, minlength=len(chunks.sizes)).tolist() == chunks.counts[chunk].tolist()
        assert {table.shard_of(sample) for sample in samples} == set(chunks.shards[chunk].tolist())
        seen += samples.tolist()
    assert sorted(seen) == sorted(set(range(30)) - set(held_out) - small)
    assert chunks.too_small == len(small - set(held_out))
    assert chunks.total == 30
    assert chunks.chunk_bytes.sum() == table.shard_size.sum()


def test_samples_are_assigned_to_the_nearest_shape(table):
    chunks = ChunkedSamples.split(table, Bucketing.of(64, BUCKETS), 1)
    sizes = {
        table.key(int(sample)).partition("-")[2]: chunks.sizes[bucket].tolist()
        for sample, bucket in zip(*chunks.samples(0), strict=True)
    }
    assert sizes["square"] == sizes["small"] == sizes["bad"] == [64, 64]
    assert sizes["wide"][1] > sizes["wide"][0]
    assert sizes["tall"] == sizes["wide"][::-1]


@pytest.mark.parametrize("listed", [list(range(30)), [3, 8, 9, 10, 29]])
def test_listed_samples_have_the_same_buckets(table, listed):
    bucketing = Bucketing.of(64, BUCKETS)
    samples, buckets = ListedSamples(table, np.array(listed), bucketing).samples(0)
    whole = dict(zip(*ChunkedSamples.split(table, bucketing, 1).samples(0), strict=True))
    assert samples.tolist() == listed
    assert buckets.tolist() == [whole[sample] for sample in listed]
    assert ListedSamples(table, np.array(listed), bucketing).counts.sum() == len(listed)


@pytest.mark.parametrize("bucketing", [Bucketing.of(64, None), Bucketing.of(64, BUCKETS, 2)])
def test_every_round_shows_each_set_as_often_as_its_repeats_say(table, bucketing):
    """Shards 0, 1 and 5 are shown 2.3 times, 2 and 3 once, and 4 for a part."""
    repeats = Repeats(np.array([2.3, 1.0, 0.4]), np.array([0, 0, 1, 1, 2, 0]))
    chunks = ChunkedSamples.split(table, bucketing, 2, seed=1, held_out=np.array([0, 7]), repeats=repeats)
    left = np.full(6, 4 if bucketing.max_upscaling else 5) - [1, 1, 0, 0, 0, 0]
    wanted = [round(2.3 * (left[0] + left[1] + left[5])), left[2] + left[3], round(0.4 * left[4])]
    assert chunks.copies == 3
    assert chunks.counts.sum() == sum(wanted)

    times = np.zeros(30, int)
    for turn in range(20):
        shown = np.zeros(30, int)
        for chunk in range(2):
            copies, buckets = chunks.samples(chunk, turn)
            assert len(set(copies.tolist())) == len(copies)
            assert np.bincount(buckets, minlength=len(chunks.sizes)).tolist() == chunks.counts[chunk].tolist()
            np.add.at(shown, copies % 30, 1)
        of_shard = shown.reshape(6, 5).sum(axis=1)
        assert [of_shard[[0, 1, 5]].sum(), of_shard[[2, 3]].sum(), of_shard[4]] == wanted
        assert set(shown[:5]) <= {0, 2, 3}
        times += shown
    for chunk in range(2):  # in the long run, all samples of a set, chunk and bucket are shown equally often
        samples, buckets = chunks.samples(chunk, 0)
        for shards in ([0, 1, 5], [2, 3], [4]):
            for bucket in range(len(chunks.sizes)):
                here = samples[(buckets == bucket) & np.isin(samples % 30 // 5, shards)] % 30
                assert not len(here) or np.ptp(times[here]) <= 1


def test_repeats_are_told_apart_unless_all_are_one():
    one, two = (Repeats(np.array([1.0, times]), np.array([0, 1])) for times in (1.0, 2.0))
    assert one.digest is None
    assert two.digest not in (None, Repeats(np.array([1.0, 2.0]), np.array([1, 0])).digest)
