from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, inject_adapter_in_model

from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.datamodules import Chunks, DataProgress, WebDatasetDataModule

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = inject_adapter_in_model(
            LoraConfig(r=1, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(1, 1))
        )
        self.chunks: list[int] = []
        self.keys: list[str] = []

    def training_step(self, batch, batch_idx):
        self.keys += batch["key"]
        return self.net(batch["pixel_values"].float().mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        """Lightning warns without it."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-6)

    def on_train_chunk_end(self, chunk):
        self.chunks.append(chunk)


class Watcher(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_chunk_end(self, trainer, pl_module, chunk):
        self.seen.append((chunk, trainer.global_step))


@pytest.fixture
def fit(make_shards, trainer_options):
    paths = make_shards(*[4] * 6)

    def fit(callbacks=(), ckpt_path=None, data=None, **options):
        data = WebDatasetDataModule(
            str(paths[0].parent), resolution=8, num_workers=0, **{"batch_size": 2, "chunks": Chunks(3)} | (data or {})
        )
        module = Module()
        options = trainer_options | {"enable_checkpointing": True, "callbacks": list(callbacks)} | options
        Trainer(**options).fit(module, data, ckpt_path=ckpt_path)
        return module, data

    return fit


def test_hooks_see_the_end_of_each_chunk(fit, caplog):
    watcher = Watcher()
    with caplog.at_level(logging.INFO):
        module, data = fit([watcher], max_epochs=2)

    plan = data.plan()
    cursor, chunks = plan.start(), []
    for _ in range(2):
        for _, after in plan.walk(cursor):
            if plan.visit(after) != plan.visit(cursor):
                chunks.append(plan.chunk(cursor))
            cursor = after
    assert module.chunks == chunks
    assert watcher.seen == list(zip(chunks, (4, 8, 12, 16, 20, 24), strict=True))
    lines = [record.getMessage() for record in caplog.records if "chunk" in record.getMessage()]
    assert lines[0] == f"finished chunk 1 of 3 in pass 1 at step 4 (number {chunks[0]} in lit-lora shards plan)"
    assert lines[-1] == f"finished chunk 3 of 3 in pass 2 at step 24 (number {chunks[5]} in lit-lora shards plan)"


def test_metrics(fit, tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger=logger, log_every_n_steps=4, max_epochs=1)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    assert [float(row.split(",")[names.index("data/chunk")]) for row in rows[1:]] == [1.0, 2.0, 3.0]
    assert "data/bad_samples" not in names


def test_bad_samples_are_counted(fit, tmp_path, make_shards):
    path = tmp_path / "shards" / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8")
    data[start : start + 8] = bytes(8)
    path.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="bad sample 0008"):
        fit(logger=CSVLogger(tmp_path), log_every_n_steps=12, max_epochs=1, data={"max_bad_samples": 1})
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert float(rows[1].split(",")[rows[0].split(",").index("data/bad_samples")]) == 1.0


def test_a_single_chunk_calls_no_hook(fit):
    watcher = Watcher()
    module, _ = fit([watcher], data={"chunks": Chunks()}, max_epochs=2)
    assert not watcher.seen
    assert not module.chunks


def test_the_users_callback_is_kept_and_not_duplicated(fit):
    own, watcher = DataProgress(), Watcher()
    fit([own, watcher], max_epochs=1)
    assert len(watcher.seen) == 3


def test_checkpoint_at_the_end_of_each_chunk(fit, tmp_path):
    def save():
        return AdapterCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, save_on_chunk_end=True)

    whole, _ = fit([save()], max_epochs=2)
    assert {path.stem for path in (tmp_path / "saved").glob("*.ckpt")} == {f"step={n}" for n in (4, 8, 12, 16, 20, 24)}
    resumed, _ = fit([save()], tmp_path / "saved" / "step=8.ckpt", max_epochs=2)
    assert resumed.keys == whole.keys[16:]
    assert resumed.chunks == whole.chunks[2:]


@pytest.mark.parametrize(
    ("chunks", "number", "epoch"),
    [(Chunks(3, passes=2), 3, 24), (Chunks(3, steps=3), 3, 9), (Chunks(samples=12), 2, 12)],
)
def test_an_epoch_is_a_pass_through_all_chunks(fit, chunks, number, epoch):
    module, data = fit(max_epochs=2, data={"chunks": chunks})
    assert data.plan().num_chunks == number
    assert len(module.keys) == 2 * 2 * epoch
    assert len(module.chunks) == 2 * data.plan().num_chunks


def test_overfitting_ends_no_chunk(fit):
    watcher = Watcher()
    fit([watcher], overfit_batches=3, max_epochs=3)
    assert not watcher.seen


@pytest.mark.parametrize("step", [3, 4, 5])
def test_overfitting_is_resumed_within_its_epoch(fit, tmp_path, step):
    def save():
        return AdapterCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)

    whole, _ = fit([save()], overfit_batches=3, max_epochs=3)
    resumed, _ = fit([save()], tmp_path / f"step={step}.ckpt", overfit_batches=3, max_epochs=3)
    assert resumed.keys == whole.keys[2 * step :]


class Epochs(Callback):
    """The batches of each epoch, and after which of them there was validation."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.validated: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.batches.append(0)

    def on_train_batch_end(self, *_):
        if not self.batches:  # Lightning does not call the start of an epoch that is gone on with
            self.batches.append(0)
        self.batches[-1] += 1

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(len(self.batches))


@pytest.mark.filterwarnings("ignore:this run is not what the checkpoint was made with")
@pytest.mark.parametrize(("size", "rest", "whole"), [(1, 16, 20), (4, 4, 5), (5, 4, 4)])
def test_epochs_are_whole_after_the_batch_size_changed(fit, tmp_path, size, rest, whole):
    options = {"chunks": Chunks(leftovers="pad"), "val_samples": 4}
    save = AdapterCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit([save], max_steps=2, data=options)
    epochs = Epochs()
    options |= {"batch_size": size}
    save = AdapterCheckpoint(tmp_path / "saved", every_n_train_steps=2)
    module, _ = fit([save, epochs], tmp_path / "saved" / "step=2.ckpt", options, max_epochs=3)
    assert epochs.batches == [rest, whole, whole]
    assert len(module.keys) == (rest + 2 * whole) * size
    assert epochs.validated == [1, 2, 3]


def test_limited_epochs_are_validated_too(fit):
    epochs = Epochs()
    module, _ = fit(
        [epochs],
        data={"val_samples": 4, "chunks": Chunks()},
        max_epochs=4,
        limit_train_batches=6,
        accumulate_grad_batches=4,
    )
    assert epochs.batches == [6, 4, 6, 4]
    assert epochs.validated == [1, 2, 3, 4]
    assert module.trainer.global_step == 6


@pytest.mark.parametrize(
    ("share", "batches"), [(0.5, [5] * 4), (0.7, [7, 3, 7, 3]), (0.1, [1] * 4), (1.0, [10] * 4), (6, [6, 4, 6, 4])]
)
def test_a_share_of_the_batches_is_one_of_the_pass(fit, tmp_path, share, batches):
    save = AdapterCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    epochs, options = Epochs(), {"data": {"val_samples": 4, "chunks": Chunks()}, "limit_train_batches": share}
    whole, _ = fit([save, epochs], max_epochs=4, **options)
    assert epochs.batches == batches
    assert epochs.validated == [1, 2, 3, 4]
    for step in range(1, min(sum(batches), 12)):
        again = Epochs()
        save = AdapterCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        resumed, _ = fit([save, again], tmp_path / "saved" / f"step={step}.ckpt", max_epochs=4, **options)
        assert whole.keys[-len(resumed.keys) :] == resumed.keys
        assert len(resumed.keys) == 2 * (sum(batches) - step)
        assert len(again.validated) == sum(sum(batches[: number + 1]) > step for number in range(4))


def test_chunks_that_end_between_two_steps_are_saved_after_the_step(fit, tmp_path):
    def save():
        return AdapterCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, save_on_chunk_end=True)

    options = {"accumulate_grad_batches": 3, "max_epochs": 2}
    whole, _ = fit([save()], **options)
    steps = sorted(int(path.stem.partition("=")[2]) for path in (tmp_path / "saved").glob("*.ckpt"))
    assert steps == [2, 3, 4, 6, 7, 8]
    for step in (2, 6):
        resumed, _ = fit([save()], tmp_path / "saved" / f"step={step}.ckpt", **options)
        ours, theirs = resumed.state_dict(), whole.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert resumed.keys == whole.keys[len(whole.keys) - len(resumed.keys) :]


def test_tuner_and_validation_keep_the_position(fit, trainer_options, tmp_path):
    save = AdapterCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fresh, _ = fit([save], max_steps=5, data={"val_samples": 4})
    module = Module()
    again = WebDatasetDataModule(
        str(tmp_path / "shards"), batch_size=2, resolution=8, num_workers=0, chunks=Chunks(3), val_samples=4
    )
    save = AdapterCheckpoint(tmp_path / "saved", every_n_train_steps=5)
    trainer = Trainer(**trainer_options | {"enable_checkpointing": True, "callbacks": [save]})
    trainer.validate(module, again, ckpt_path=tmp_path / "saved" / "step=5.ckpt", verbose=False)
    trainer = Trainer(**trainer_options, max_steps=5)
    trainer.fit(module, again)
    assert module.keys == fresh.keys
