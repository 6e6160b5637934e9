"""What needs a GPU: skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig

from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, MemoryProfiler
from lit_lora.datamodules import PrefetchToDevice, WebDatasetDataModule
from lit_lora.families import StableDiffusion
from lit_lora.memory.host_weights import HostWeights
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.prompts import Prompt
from lit_lora.quantization import FP8, NF4, W8A8, Int8, Quantization
from lit_lora.tools.drawing import Drawer
from tests.distributed.scenarios import Seen
from tests.helpers import loader_of, make_batches

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]

QUANTIZATIONS: list[Quantization | None] = [None, Int8(), W8A8(), FP8(), NF4()]


@pytest.fixture(scope="session")
def one_of_one() -> Iterator[None]:
    """The environment that torchrun gives the only process of a run, and its process group, which no test ends."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0}
    names |= {"MASTER_PORT": store.port, "TORCHELASTIC_RUN_ID": 1}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.cuda.set_device(0)
    of_one: dict[str, Any] = {"store": store, "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", **of_one, device_id=torch.device("cuda", 0))
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def train(sd_folder: Path, tmp_path: Path, accelerator: str = "gpu", **options: Any) -> tuple[Seen, LoraDiffusion]:
    torch.manual_seed(0)
    trainer_options = {name: options.pop(name) for name in ("strategy", "callbacks", "ckpt_path") if name in options}
    seen = Seen()
    options.setdefault("base_dtype", "float32")
    module = LoraDiffusion(
        StableDiffusion(str(sd_folder)),
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"]),
        optimizer=options.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)),
        **options,
    )
    callbacks = [seen, *trainer_options.pop("callbacks", ())]
    ckpt_path = trainer_options.pop("ckpt_path", None)
    Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=4,
        max_epochs=-1,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(c, AdapterCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer_options,
    ).fit(module, loader_of(make_batches(4)), ckpt_path=ckpt_path)
    return seen, module


def near(one: Seen, other: Seen, tolerance: float = 1e-5) -> bool:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) <= tolerance


def test_the_gpu_learns_what_the_cpu_learns(sd_folder: Path, tmp_path: Path) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    assert near(train(sd_folder, tmp_path)[0], train(sd_folder, tmp_path, "cpu")[0], 1e-4)


@pytest.mark.parametrize("base", QUANTIZATIONS, ids=lambda s: type(s).__name__)
def test_every_storage_trains(base: Quantization | None, sd_folder: Path, tmp_path: Path) -> None:
    gpu = train(sd_folder, tmp_path, quantization=base, base_dtype="bfloat16")[0]
    cpu = train(sd_folder, tmp_path, "cpu", quantization=base, base_dtype="bfloat16")[0]
    assert near(gpu, cpu, 0.05)


@pytest.mark.parametrize(
    "quantization",
    [Int8(), W8A8(), FP8(), NF4(), NF4(double_quant=False)],
    ids=["Int8", "W8A8", "FP8", "NF4", "NF4 single"],
)
def test_stored_weights_come_back_as_on_the_cpu(quantization: Quantization) -> None:
    weight = torch.randn(96, 64, 3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        stored = quantization.quantize(weight)
        here = quantization.dequantize(stored, weight.shape, dtype)
        there = quantization.dequantize({name: value.cuda() for name, value in stored.items()}, weight.shape, dtype)
        assert (here.float() - there.cpu().float()).abs().max() <= 2 * torch.finfo(dtype).eps * here.abs().max()


@pytest.mark.parametrize("key", ["offload_encoders", "offload_blocks", "offload_activations", "optimizer_in_backward"])
@pytest.mark.parametrize("base", [None, NF4()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_memory_keys_change_no_loss(
    key: str, base: Quantization | None, gradient_checkpointing: bool, sd_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "quantization": base,
        "base_dtype": "float32" if base is None else "bfloat16",
    }
    memory = MemoryOptions(gradient_checkpointing=gradient_checkpointing)
    plain = train(sd_folder, tmp_path, memory=memory, **options)
    kept = train(sd_folder, tmp_path, memory=replace(memory, **{key: True}), **options)  # type: ignore[arg-type]
    assert near(plain[0], kept[0], 1e-5 if base is None else 5e-3)


def test_page_locked_weights_are_not_rounded_up() -> None:
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    tensors = [torch.randn(3 << 18) for _ in range(24)]  # 3 MiB, of which torch makes 4
    expected = [tensor.clone() for tensor in tensors]
    weights = HostWeights(tensors)
    weights.pin()
    assert all(tensor.is_pinned() for tensor in tensors)
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, expected, strict=True))
    taken = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert taken < 1.1 * weights.nbytes
    weights.fetch(torch.device("cuda"), torch.cuda.Stream())
    weights.wait()
    assert all(torch.equal(tensor.cpu(), other) for tensor, other in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("waiting", ["models", "blocks"])
def test_what_waits_in_host_memory_changes_no_image(waiting: Any, sd_folder: Path) -> None:
    drawn = []
    for waits in (None, waiting):
        options: dict[str, Any] = {"family": None, "dtype": "float32", "device": "cuda", "sizes": [(32, 32)]}
        drawer = Drawer(str(sd_folder), **options)
        drawer._saving = waits
        drawer.adapt([])
        prompts = [Prompt("a star", seed=3), Prompt("a moon", seed=4)]
        images = drawer.draw(prompts, num_inference_steps=2, guidance_scale=3.0, height=32, width=32)
        drawn.append(np.stack([np.asarray(one.image) for one in images]).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_eight_bit_optimizers(sd_folder: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    seen, _ = train(sd_folder, tmp_path, optimizer=lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2))
    assert near(seen, train(sd_folder, tmp_path)[0], 0.05)


def test_the_profiler_measures_the_gpu(sd_folder: Path, tmp_path: Path) -> None:
    profiler = MemoryProfiler(every_n_steps=1)
    train(sd_folder, tmp_path, callbacks=[profiler])
    assert (tmp_path / "memory.json").exists() or list(tmp_path.rglob("memory.json"))


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize("strategy", ["ddp", "lit_lora_fsdp", "fsdp with cpu_offload"])
@pytest.mark.parametrize("base", [None, NF4(), Int8()], ids=lambda s: type(s).__name__)
def test_strategies_with_nccl(strategy: str, base: Quantization | None, sd_folder: Path, tmp_path: Path) -> None:
    from lit_lora.distributed import LitLoraFSDP

    options: dict[str, Any] = {"quantization": base, "base_dtype": "float32" if base is None else "bfloat16"}
    alone, _ = train(sd_folder, tmp_path, **options)
    made: Any = LitLoraFSDP(cpu_offload=True) if strategy.endswith("offload") else strategy
    saving = AdapterCheckpoint(
        tmp_path / "ck", filename="{step}", auto_insert_metric_name=False, every_n_train_steps=2, save_top_k=-1
    )
    seen, module = train(sd_folder, tmp_path, strategy=made, callbacks=[saving, AdapterEMA()], **options)
    assert near(seen, alone, 1e-5 if base is None else 5e-3)
    made = LitLoraFSDP(cpu_offload=True) if strategy.endswith("offload") else strategy
    again, _ = train(
        sd_folder,
        tmp_path,
        strategy=made,
        callbacks=[AdapterEMA()],
        ckpt_path=str(tmp_path / "ck" / "4.ckpt"),
        **options,
    )
    assert not again.losses  # all four steps are done
    assert len(module.generate(["a"], [0], num_inference_steps=1, guidance_scale=1.0)) == 1


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize("stage", ["1", "2", "2_offload", "3", "3_offload"])
@pytest.mark.parametrize("base", [None, NF4()], ids=lambda s: type(s).__name__)
def test_deepspeed_with_nccl(stage: str, base: Quantization | None, sd_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    options: dict[str, Any] = {"quantization": base, "base_dtype": "float32" if base is None else "bfloat16"}
    alone, _ = train(sd_folder, tmp_path, **options)
    saving = AdapterCheckpoint(tmp_path / "ck", filename="{step}", auto_insert_metric_name=False, every_n_train_steps=2)
    strategy = f"lit_lora_deepspeed_stage_{stage}"
    seen, _ = train(sd_folder, tmp_path, strategy=strategy, callbacks=[saving], **options)
    assert near(seen, alone, 1e-5 if base is None else 5e-3)
    again, _ = train(sd_folder, tmp_path, strategy=strategy, ckpt_path=str(tmp_path / "ck" / "4.ckpt"), **options)
    assert not again.losses


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize("strategy", ["auto", "ddp", "lit_lora_fsdp"])
@pytest.mark.parametrize("base", [None, Int8(), W8A8(), NF4()], ids=lambda s: type(s).__name__)
def test_compiled_blocks(strategy: str, base: Quantization | None, sd_folder: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"quantization": base, "base_dtype": "float32" if base is None else "bfloat16"}
    plain, _ = train(sd_folder, tmp_path, **options)
    compiled, _ = train(sd_folder, tmp_path, strategy=strategy, compile_blocks=True, **options)
    assert near(plain, compiled, 1e-4 if base is None else 2e-2)
    assert sum(torch._dynamo.utils.counters["stats"].values()) > 0


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize("key", ["offload_encoders", "offload_blocks", "offload_activations"])
def test_offloading_under_ddp(key: str, sd_folder: Path, tmp_path: Path) -> None:
    alone, _ = train(sd_folder, tmp_path)
    assert near(train(sd_folder, tmp_path, strategy="ddp", memory=MemoryOptions(**{key: True}))[0], alone)


@pytest.mark.parametrize("base", [None, NF4()], ids=lambda s: type(s).__name__)
def test_blocks_in_a_folder(
    base: Quantization | None, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.mapped.SMALL", 1000)
    options: dict[str, Any] = {"quantization": base, "base_dtype": "float32" if base is None else "bfloat16"}
    in_memory, _ = train(sd_folder, tmp_path, memory=MemoryOptions(offload_blocks=True), **options)
    memory = MemoryOptions(offload_blocks=True, offload_folder=str(tmp_path / "frozen"))
    assert near(train(sd_folder, tmp_path, memory=memory, **options)[0], in_memory)


def test_batches_that_are_copied_ahead(make_shards: Any, trainer_options: dict[str, Any]) -> None:
    paths = make_shards(24, 24)

    class Sums(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[torch.Tensor] = []

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            assert batch["pixel_values"].is_cuda
            large = torch.ones(1 << 12, 1 << 12, device="cuda")
            large @ large  # the device lags behind, so copies of later batches could overwrite this one
            self.seen.append(batch["pixel_values"].double().sum((1, 2, 3)))
            return self.weight * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.weight], lr=0.1)

    seen = []
    for callbacks in ([], [PrefetchToDevice()]):
        module = Sums()
        data = WebDatasetDataModule(str(paths[0].parent), resolution=256, batch_size=4, num_workers=2)
        options = trainer_options | {"accelerator": "gpu", "callbacks": callbacks, "max_epochs": 3}
        Trainer(**options).fit(module, data)
        seen.append(torch.cat(module.seen).tolist())
    assert len(seen[0]) == 3 * 48
    assert seen[0] == seen[1]
