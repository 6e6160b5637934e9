"""Encodes the shards of ``lit-lora cache``, in one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lit_lora.datamodules.batches.buckets import Bucketing
from lit_lora.datamodules.caching.cache_writer import CachedShard, CacheWriter
from lit_lora.datamodules.caching.latent_cache import CacheDescription
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.distributed.jobs import call_in_worker, interrupts_ignored, start_worker
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.memory.one_on_device import OneOnDevice
from lit_lora.progress_bar import messages_above_bar

_Shards = Generator[CachedShard, None, None]
_POLL_S = 0.2


@dataclass(frozen=True)
class CacheWork:
    """The samples to encode and the encoders, in a form that can be sent to other processes.

    Attributes:
        family: Model family, not loaded yet.
        base_dtype: dtype of the text encoders.
        table: Table of the samples.
        description: Description of the cache.
        bucketing: Size to which each image is resized.
        captions: Captions of the samples.
        batch_size: Number of images that a process encodes at a time.
        num_workers: Number of threads that read and decode samples for each process that encodes.
    """

    family: ModelFamily
    base_dtype: torch.dtype
    table: SampleTable
    description: CacheDescription
    bucketing: Bucketing
    captions: Captions
    batch_size: int
    num_workers: int

    def writer(self, device: str) -> CacheWriter:
        """Load the encoders, and return a writer that uses them on a device, which holds one of them at a time."""
        unneeded = {"denoiser"} if "text" in self.description.cached else {"denoiser", "text"}
        self.family.load(self.base_dtype, without=unneeded)
        bring = None if device == "cpu" else brings_one(self.family, torch.device(device))
        return CacheWriter(
            self.family,
            self.table,
            self.description,
            self.bucketing,
            self.captions,
            self.batch_size,
            self.num_workers,
            bring,
        )

    def write_all(self, targets: Mapping[Path, int], jobs: int, device: str) -> _Shards:
        """Write the shards of the cache and yield each one when it is complete, in any order.

        Args:
            targets: For each shard of the cache, the number of its source shard in the table.
            jobs: Number of processes; 1 encodes in this process.
            device: ``auto``, ``cpu`` or ``cuda``.

        Raises:
            UserError: If a part of the model cannot be loaded, an existing shard was made from other samples, ``cuda`` is
                asked for without a GPU, or a process dies.
        """
        devices = _devices(device)
        samples = int(np.diff(self.table.starts)[list(targets.values())].sum())
        with tqdm(total=samples, desc="caching", unit="sample", leave=False, disable=None) as bar, messages_above_bar():
            if jobs == 1:
                writer = self.writer(devices[0])
                for path, shard in targets.items():
                    yield writer.write(shard, path, bar.update)
            else:
                yield from _write_in_parallel(self, targets, jobs, devices, bar)


def brings_one(family: ModelFamily, device: torch.device) -> Callable[[str], None]:
    """A function that brings one encoder of a loaded family to the device and frees the others there.

    Args:
        family: Family whose encoders are in host memory; its inputs go to the device from now on.
        device: Device that encodes.
    """
    models = {name: model for name, model in family.named_children() if name != "denoiser"}
    keeper = OneOnDevice(models, device)
    family.computes_on = device

    def bring(name: str) -> None:
        keeper.bring([one for one in models if one != "vae"] if name == "text" else [name])

    return bring


class _Worker:
    """The state of a process that encodes."""

    current: _Worker

    def __init__(self, work: CacheWork, device: str, done: Any, stop: Any) -> None:
        self.work = work
        self.device = device
        self.done = done
        self.stop = stop
        self.writer: CacheWriter | None = None

    @classmethod
    def start(cls, work: CacheWork, devices: Any, done: Any, stop: Any, jobs: int) -> None:
        """Set up a process of the pool."""
        start_worker()
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
        cls.current = cls(work, devices.get(), done, stop)

    @classmethod
    def write(cls, shard: int, path: Path) -> CachedShard:
        """Write one shard."""
        self = cls.current
        if self.writer is None:  # not in start(), where an error would lose its message
            self.writer = self.work.writer(self.device)
        return self.writer.write(shard, path, self.progress)

    def progress(self, samples: int) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        with self.done.get_lock():
            self.done.value += samples


def _devices(device: str) -> list[str]:
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        raise UserError("device=cuda needs a GPU, and this machine has none; choose cpu or auto")
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


def _write_in_parallel(
    work: CacheWork, targets: Mapping[Path, int], jobs: int, devices: list[str], bar: Any
) -> _Shards:
    context = multiprocessing.get_context("spawn")
    done, stop, queue = context.Value("q", 0), context.Event(), context.SimpleQueue()
    for number in range(jobs):
        queue.put(devices[number % len(devices)])
    with ProcessPoolExecutor(jobs, context, _Worker.start, (work, queue, done, stop, jobs)) as pool:
        with interrupts_ignored():
            pending: set[Future[CachedShard]] = {
                pool.submit(call_in_worker, _Worker.write, shard, path) for path, shard in targets.items()
            }
        try:
            while pending:
                finished, pending = wait(pending, _POLL_S, "FIRST_COMPLETED")
                bar.update(done.value - bar.n)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {jobs} processes died, perhaps for lack of memory; start again with fewer jobs or a smaller"
                " batch_size: complete shards are kept"
            ) from error
        finally:
            stop.set()  # after an error, abandon the shards that are being written
            for future in pending:
                future.cancel()
