"""Every strategy on two processes: it learns what one process learns, and goes on from what any other has saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

from lit_lora.planning.plan_run import plan_run
from lit_lora.planning.processes import processes_with
from tests.distributed import scenarios
from tests.distributed.scenarios import FEATURES, GLOBAL_BATCH, OF_FOUR, RESUMED_TO, SAVED_AT, STEPS, STRATEGIES
from tests.helpers import made_once, processes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NEAR = 1e-5
"""How far losses may be apart; they are about one."""
QUANTISED_NEAR = 5e-3
"""In bfloat16 batches of other sizes are rounded otherwise."""


@pytest.fixture(scope="session")
def runs(shallow_sd_folder: Path, session_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""

    def make(folder: Path) -> None:
        torch.set_num_threads(1)
        common = (shallow_sd_folder, session_shards)
        single = {"train": scenarios.losses_and_checkpoint("auto", *common, folder / "single-train")}
        for feature in FEATURES:
            single[feature] = scenarios.with_feature(feature, "auto", *common, folder / f"single-{feature}")
        saved = folder / "single-train" / f"{SAVED_AT}.ckpt"
        scenarios.rewritten("auto", *common, folder / "single-rewritten", saved)
        (folder / "single.json").write_text(json.dumps(single))
        # Only the first process has weights to read: it reads for all.
        without = folder / "without weights"
        shutil.copytree(shallow_sd_folder, without, ignore=shutil.ignore_patterns("*.safetensors"))
        for count, part, strategies in ((2, folder, STRATEGIES), (4, folder / "four", OF_FOUR)):
            part.mkdir(exist_ok=True)
            models = ":".join(map(str, [shallow_sd_folder, *[without] * (count - 1)]))
            processes(
                ["-m", "tests.distributed.cluster_script", part, models, session_shards, *strategies], count, part
            )

    return made_once(tmp_path_factory, "strategies", make)


@pytest.fixture(scope="session")
def results(runs: Path) -> list[dict[str, Any]]:
    """Of both processes."""
    return [json.loads((runs / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="session")
def single(runs: Path) -> dict[str, Any]:
    """Of one process."""
    found: dict[str, Any] = json.loads((runs / "single.json").read_text())
    return found


def apart(losses: list[float], others: list[float]) -> float:
    """The largest difference."""
    return max(abs(one - other) for one, other in zip(losses, others, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_one_process(strategy: str, results: list[dict[str, Any]], single: dict[str, Any]) -> None:
    for result in results:
        losses = result[f"{strategy}/train"]["losses"]
        assert len(losses) == STEPS
        assert apart(losses, single["train"]["losses"]) <= NEAR
        logged = result[f"{strategy}/train"]["logged"]
        assert {"train/lr", "train/gradient_norm"} <= logged.keys()
        assert any(name.startswith("train/loss_q") for name in logged)
        assert logged == pytest.approx(single["train"]["logged"], abs=NEAR)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_are_those_of_one_process(strategy: str, results: list[dict[str, Any]], single: dict[str, Any]) -> None:
    assert together(results, f"{strategy}/train") == single["train"]["keys"]
    assert together(results, f"{strategy}/from/single") == single["train"]["keys"][SAVED_AT:RESUMED_TO]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_process_holds_what_is_planned(
    strategy: str, results: list[dict[str, Any]], single: dict[str, Any], shallow_sd_folder: Path
) -> None:
    given: Any = STRATEGIES[strategy]
    processes = processes_with(StrategyRegistry.get(given), len(results), len(results))
    batch = GLOBAL_BATCH // len(results)
    planned = plan_run(
        scenarios.module_of(shallow_sd_folder), batch, 16, 16, gradient_clip_val=0.5, processes=processes
    )
    kinds = planned.phases["optimizer"]
    alone = single["train"]["held"]
    for result in results:
        held = result[f"{strategy}/train"]["held"]
        assert held["frozen weights"] == pytest.approx(kinds["frozen weights"], rel=1e-4)
        assert held["adapter"] == kinds["adapter"]
        copy = alone["adapter"] // len(results) if strategy in ("ZeRO-1", "ZeRO-2") else 0
        assert held["optimizer state"] + copy == pytest.approx(kinds["optimizer state"], rel=0.01)
    assert held["optimizer state"] < (1.1 if strategy == "ddp" else 0.6) * alone["optimizer state"]


@pytest.mark.parametrize("strategy", OF_FOUR)
def test_four_processes_are_like_one(strategy: str, runs: Path, single: dict[str, Any]) -> None:
    """From the start, and going on from a single one's checkpoint."""
    results = [json.loads((runs / "four" / f"rank-{rank}.json").read_text()) for rank in range(4)]
    for part, steps in (("train", slice(0, STEPS)), ("from/single", slice(SAVED_AT, RESUMED_TO))):
        key = f"{strategy}/{part}"
        assert together(results, key) == single["train"]["keys"][steps]
        assert all(apart(result[key]["losses"], single["train"]["losses"][steps]) <= NEAR for result in results)


@pytest.mark.parametrize("strategy", OF_FOUR)
def test_every_group_of_processes_waits_as_long_as_the_strategy_says(strategy: str, runs: Path) -> None:
    """That of the strategy, those that shard the weights, and those that read the base and agree on signals over gloo."""
    for rank in range(4):
        found = json.loads((runs / "four" / f"rank-{rank}.json").read_text())[f"{strategy}/train"]
        assert found["limits"] == [scenarios.TIMEOUT.total_seconds()]
        assert found["groups"] >= 3


@pytest.mark.parametrize("strategy", OF_FOUR)
def test_one_process_goes_on_from_four(
    strategy: str, runs: Path, single: dict[str, Any], shallow_sd_folder: Path, session_shards: Path, tmp_path: Path
) -> None:
    checkpoint = runs / "four" / f"{strategy}-train" / f"{SAVED_AT}.ckpt"
    resumed = scenarios.resumed("auto", shallow_sd_folder, session_shards, tmp_path, checkpoint)
    assert resumed["same optimizer"]
    assert resumed["keys"] == single["train"]["keys"][SAVED_AT:RESUMED_TO]
    assert apart(resumed["losses"], single["train"]["losses"][SAVED_AT:RESUMED_TO]) <= NEAR


@pytest.mark.parametrize(
    ("strategy", "source"), [(strategy, source) for strategy in STRATEGIES for source in scenarios.sources(strategy)]
)
def test_a_run_goes_on_from_another_strategys_checkpoint(
    strategy: str, source: str, results: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank, result in enumerate(results):
        resumed = result[f"{strategy}/from/{source}"]
        assert resumed["same adapter"], resumed
        assert rank > 0 or resumed["same optimizer"]
        assert apart(resumed["losses"], single["train"]["losses"][SAVED_AT:RESUMED_TO]) <= NEAR


@pytest.mark.parametrize("source", STRATEGIES)
def test_one_process_goes_on_from_any_strategys_checkpoint(
    source: str, runs: Path, single: dict[str, Any], shallow_sd_folder: Path, session_shards: Path, tmp_path: Path
) -> None:
    checkpoint = runs / f"{source}-train" / f"{SAVED_AT}.ckpt"
    resumed = scenarios.resumed("auto", shallow_sd_folder, session_shards, tmp_path, checkpoint)
    assert resumed["same adapter"]
    assert resumed["same optimizer"]
    assert apart(resumed["losses"], single["train"]["losses"][SAVED_AT:RESUMED_TO]) <= NEAR


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_as_files_are_the_same_bytes(strategy: str, runs: Path) -> None:
    theirs, ours = runs / f"{strategy}-rewritten" / "adapter", runs / "single-rewritten" / "adapter"
    names = sorted(path.name for path in ours.iterdir())
    assert names == sorted(path.name for path in theirs.iterdir())
    assert "adapter_model.safetensors" in names
    assert "pytorch_lora_weights.safetensors" in names
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_hold_the_adapter_alone(strategy: str, runs: Path) -> None:
    ours, theirs = (
        torch.load(runs / f"{name}-train" / f"{STEPS}.ckpt", weights_only=True) for name in ("single", strategy)
    )
    assert ours.keys() == theirs.keys()
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(".lora_" in name for name in theirs["state_dict"])
    assert all(type(value) is torch.Tensor for value in theirs["state_dict"].values())
    assert all(
        torch.allclose(value, theirs["state_dict"][name], atol=1e-4) for name, value in ours["state_dict"].items()
    )
    assert _kinds(ours["optimizer_states"]) == _kinds(theirs["optimizer_states"])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_feature_does_what_it_does_in_one_process(
    strategy: str, feature: str, results: list[dict[str, Any]], single: dict[str, Any], runs: Path
) -> None:
    near = QUANTISED_NEAR if feature in ("Int8", "NF4") else NEAR
    for result in results:
        found, expected = result[f"{strategy}/{feature}"], single[feature]
        if reason := scenarios.REFUSED.get((strategy, feature)):
            assert reason in found.get("refused", found)
            continue
        assert "losses" in found, found
        assert apart(found["losses"], expected["losses"]) <= near
        if feature == "validation":
            assert found["val/loss"] == pytest.approx(expected["val/loss"], abs=NEAR)
        if feature == "pruned ranks":
            assert found["ranks"] == expected["ranks"]
            assert 2 * sum(found["ranks"].values()) == 3 * len(found["ranks"])
            assert found["resumed"] == found["losses"][SAVED_AT:]
            assert found["same adapter"]
            if strategy.startswith("ZeRO"):
                everywhere = sum(one[f"{strategy}/{feature}"]["held"] for one in results)
                # Weights and two states of AdamW, and what fills up the shards.
                assert 0 <= everywhere - 3 * expected["trained"] < 3 * 32
                assert found["first optimizer is gone"]
        if feature in ("parameter groups", "text encoders"):
            assert apart(found["resumed"], expected["losses"][SAVED_AT:]) <= near
        if feature == "skipped steps":
            assert (found["skipped"], found["unchanged"]) == (1, True)
            assert len(found["losses"]) == RESUMED_TO - 1
            assert "not finite in 2 steps in a row, up to step 3" in found["end"]
        if feature == "EMA":
            one, other = (_average_and_weights(runs / f"{name}-EMA") for name in ("single", strategy))
            for name, (average, weights) in one.items():
                # How far the average is from the weights: these differ themselves, where AdamW steps by a rounding error.
                assert torch.allclose(average - weights, other[name][0] - other[name][1], atol=1e-5), name
                assert torch.allclose(average, other[name][0], atol=1e-4), name
        if feature == "sampling":
            name = f"samples/step-{RESUMED_TO:06}.png"
            images = [next((runs / f"{run}-sampling").rglob(name)) for run in ("single", strategy)]
            assert images[0].stat().st_size > 0
            assert near_images(*images)


def together(results: list[dict[str, Any]], key: str) -> list[list[str]]:
    """The keys of each batch over all processes."""
    parts = [result[key]["keys"] for result in results]
    return [[name for part in batch for name in part] for batch in zip(*parts, strict=True)]


def _kinds(state: Any) -> Any:
    """The same state with the shape and dtype of each tensor in its place, and the type of everything else."""
    return tree_map(lambda value: (value.shape, value.dtype) if torch.is_tensor(value) else type(value), state)


def _average_and_weights(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of the averaged adapter, and the same of the adapter itself, at the end of a run."""
    average, weights = (
        load_file(folder / f"{RESUMED_TO}.{kind}" / "adapter_model.safetensors") for kind in ("ema.adapter", "adapter")
    )
    return {name: (value, weights[name]) for name, value in average.items()}


def near_images(one: Path, other: Path) -> bool:
    """Whether two images are the same up to rounding."""
    from torchvision.io import decode_image

    difference = decode_image(str(one)).int() - decode_image(str(other)).int()
    return difference.abs().float().mean().item() < 1


def test_the_table_in_the_docs_is_what_was_tested() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert scenarios.feature_table() in guide
