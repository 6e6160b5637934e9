from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_lora.draws import Draws, seed_of, slots_of


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together = Draws(3, [10, 11, 12]).normal("noise", (2, 4))
    alone = [Draws(3, [slot]).normal("noise", (2, 4)) for slot in (10, 11, 12)]
    assert torch.equal(together, torch.cat(alone))


def test_earlier_draws_change_nothing() -> None:
    draws = Draws(3, [1, 2])
    draws.normal("something else", (100,))
    torch.rand(5)
    assert torch.equal(draws.uniform("x"), Draws(3, [1, 2]).uniform("x"))


@pytest.mark.parametrize("other", [Draws(4, [1]), Draws(3, [2])])
def test_seed_and_slot_matter(other: Draws) -> None:
    assert not torch.equal(Draws(3, [1]).normal("noise", (8,)), other.normal("noise", (8,)))


def test_names_are_independent() -> None:
    draws = Draws(0, range(4000))
    a, b = draws.normal("a", ()), draws.normal("b", ())
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.06
    assert abs(a.mean()) < 0.06
    assert a.std() == pytest.approx(1, abs=0.05)


def test_integers_cover_their_range() -> None:
    values = Draws(0, range(3000)).integers("t", 10)
    assert values.dtype == torch.int64
    assert torch.bincount(values, minlength=10).min() > 200


def test_seed_of_is_pinned() -> None:
    # A change here would change every run's data order and noise.
    assert seed_of(0, "noise", 1) == 6545564728581758268
    assert 0 <= seed_of("x") < 2**63


def test_samples_without_numbers_are_counted_over_the_processes() -> None:
    trainers = [_trainer(rank, SimpleNamespace(batch_size=2)) for rank in (0, 1)]
    batch = {"caption": ["a", "b"]}
    assert [slots_of(batch, 3, trainer) for trainer in trainers] == [[12, 13], [14, 15]]
    assert slots_of(batch | {"slot": (5, 9)}, 3, trainers[1]) == [5, 9]


@pytest.mark.parametrize("size", [4, None])
def test_smaller_batches_share_no_number(size: int | None) -> None:
    """The last one may be smaller, or those of a sampler of batches are of any size."""
    trainers = [_trainer(rank, SimpleNamespace(batch_size=size)) for rank in (0, 1)]
    batches = [{"caption": [""] * count} for count in (4, 4, 1)]
    found = [slot for i, batch in enumerate(batches) for trainer in trainers for slot in slots_of(batch, i, trainer)]
    assert len({*found}) == len(found) == 18
    assert found == sorted(found)


@pytest.mark.parametrize("stage", ["testing", "predicting", "validating"])
def test_the_size_is_that_of_the_loader(stage: str) -> None:
    loaders = [SimpleNamespace(batch_size=2), SimpleNamespace(batch_size=8)]
    name = {"testing": "test", "predicting": "predict", "validating": "val"}[stage]
    trainer = _trainer(0, None, training=False, **{stage: True, f"{name}_dataloaders": loaders})
    assert slots_of({"caption": ["a"]}, 3, trainer, 1) == [48]
    assert slots_of({"caption": ["a"]}, 3, trainer) == [12]


def _trainer(rank: int, loader: Any, **options: Any) -> SimpleNamespace:
    stage = {"training": True, "testing": False, "predicting": False, "train_dataloader": loader}
    return SimpleNamespace(**{"world_size": 2, "global_rank": rank} | stage | options)
