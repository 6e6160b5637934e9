"""Images per second of this project's loader and of other loaders: ``python benchmarks/data_throughput.py``.

All loaders read the same generated JPEGs (512 to 768 px, quality 90), resize the short side to 512, crop the middle, and make
batches. They have the same number of workers (threads in this project, processes in the others) with one torch thread each:

- ours: ``WebDatasetDataModule``.
- webdataset: its pipeline with PIL's decoder and the usual torchvision transforms on PIL images.
- litdata: a ``StreamingDataset`` that was optimized before; its own decoder and the same transforms on tensors.
- ImageFolder: torchvision's data set with the same transforms on PIL images.
- limit: torchvision's decoder, resize and crop on bytes in memory, in the same number of processes, and nothing else.

The loaders take turns pass by pass, so that changes of the machine's speed affect all of them. Each ratio is the median over the
rounds. On a machine that others use too, CPU time is more reliable than wall time. The files are in the page cache, and each
loader makes one pass to warm up.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from environment import versions
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from lit_lora.datamodules import Chunks, ImageDecoder, SampleDecoder, WebDatasetDataModule

SIDE = 512
SHARDS = 8
Pass = Callable[[], int]
"""Reads all images once and returns their number."""


def make_image(number: int) -> bytes:
    """Make a JPEG of about 140 KB with the spectrum of a photograph and with edges."""
    random = np.random.default_rng(number)
    width, height = (int(n) for n in random.integers(SIDE, 769, 2))
    noise = torch.Generator().manual_seed(number)
    image = torch.zeros(1, 3, height, width)
    for level in range(8):
        grey, colour = torch.randn(2, 1, 3, max(2, height >> level), max(2, width >> level), generator=noise)
        octave = F.interpolate(grey[:, :1] + 0.3 * colour, (height, width), mode="bilinear")
        image += octave * 4.7 * 1.3**level
    for _ in range(12):
        top, left = int(random.integers(height - 64)), int(random.integers(width - 64))
        box = image[..., top : top + int(random.integers(32, 256)), left : left + int(random.integers(32, 256))]
        box += torch.tensor(random.normal(0, 40, (3, 1, 1)), dtype=torch.float32)
    pixels = (image[0] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_data(folder: Path, count: int) -> list[bytes]:
    """Write the same images as shards in ``shards`` and as single files in ``files/all``; return their bytes."""
    import webdataset

    images = [make_image(number) for number in range(count)]
    (folder / "files" / "all").mkdir(parents=True)
    (folder / "shards").mkdir()
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / "shards" / f"{shard:06}.tar")) as writer:
            for number in range(shard, count, SHARDS):
                writer.write({"__key__": f"{number:06}", "jpg": images[number], "txt": f"image {number}"})
    for number, image in enumerate(images):
        (folder / "files" / "all" / f"{number:06}.jpg").write_bytes(image)
    return images


def ours(folder: Path, batch_size: int, workers: int) -> Pass:
    """Passes of this project's data module."""
    return passes_with(ImageDecoder(center_crop=True), folder, batch_size, workers, resolution=SIDE)


def passes_with(decoder: SampleDecoder, folder: Path, batch_size: int, workers: int, **options: Any) -> Pass:
    """Passes of this project's data module with a decoder."""
    data = WebDatasetDataModule(
        str(folder / "shards"),
        batch_size=batch_size,
        decoder=decoder,
        chunks=Chunks(leftovers="pad"),
        num_workers=workers,
        **options,
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: sum(int(batch["weight"].sum()) for batch in loader)


def usual_transform() -> Any:
    """The usual transforms of PIL images."""
    steps = [
        transforms.Resize(SIDE, InterpolationMode.BICUBIC),
        transforms.CenterCrop(SIDE),
        transforms.ToTensor(),
    ]
    return transforms.Compose(steps)


def tensor_transform() -> Any:
    """The same transforms of uint8 tensors, in the faster one of torchvision's two implementations."""
    steps = [
        transforms.v2.Resize(SIDE, InterpolationMode.BICUBIC, antialias=True),
        transforms.v2.CenterCrop(SIDE),
        transforms.v2.ToDtype(torch.float32, scale=True),
    ]
    return transforms.v2.Compose(steps)


def plain_webdataset(folder: Path, batch_size: int, workers: int) -> Pass:
    import webdataset

    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=100, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(usual_transform(), str)
    )
    return of_loader(loader(dataset, batch_size, workers))


def litdata(folder: Path, batch_size: int, workers: int) -> Pass:
    from litdata import StreamingDataLoader, StreamingDataset

    class Dataset(StreamingDataset):
        resize = tensor_transform()

        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return self.resize(sample["image"]), sample["caption"]

    optimized = folder / "optimized"
    if not optimized.exists():
        optimize(folder, optimized)
    dataset = Dataset(str(optimized), shuffle=True)
    options: dict[str, Any] = {"persistent_workers": True} if workers else {}
    return of_loader(StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers, **options))


def optimize(folder: Path, optimized: Path) -> None:
    import litdata

    files = sorted((folder / "files" / "all").glob("*.jpg"))
    litdata.optimize(
        fn=litdata_sample,
        inputs=[str(path) for path in files],
        output_dir=str(optimized),
        chunk_bytes="16MB",
        num_workers=1,
        verbose=False,
        start_method="fork",
    )


def litdata_sample(path: str) -> dict[str, Any]:
    return {"image": Image.open(path), "caption": f"image {Path(path).stem}"}


def image_folder(folder: Path, batch_size: int, workers: int) -> Pass:
    dataset = ImageFolder(str(folder / "files"), usual_transform())
    return of_loader(loader(dataset, batch_size, workers, shuffle=True))


def loader(dataset: Any, batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, num_workers=workers, persistent_workers=workers > 0, **options)


def of_loader(batches: Iterable[Any]) -> Pass:
    return lambda: sum(len(images) for images, _ in batches)


def decode(images: list[bytes]) -> int:
    """Decode, resize and crop images; return their number."""
    for encoded in images:
        frame(bytearray(encoded))
    return len(images)


def frame(encoded: bytearray) -> Any:
    """Decode, resize and crop one image."""
    image = decode_image(torch.frombuffer(encoded, dtype=torch.uint8), ImageReadMode.RGB)
    return v2.center_crop(v2.resize(image, [SIDE], InterpolationMode.BICUBIC, antialias=True), [SIDE, SIDE])


def limit(images: list[bytes], workers: int) -> Pass:
    """Passes that only decode, resize and crop."""
    if not workers:
        return lambda: decode(images)
    pools = [
        ProcessPoolExecutor(1, multiprocessing.get_context("fork"), start, (share,))
        for share in (images[number::workers] for number in range(workers))
    ]
    return lambda: sum(future.result() for future in [pool.submit(decode_share) for pool in pools])


def whole_limit(folder: Path, batch_size: int, workers: int) -> Pass:
    """Passes that also read the bytes from the shards and copy the images into batches, in a process for each worker.

    Nothing else is done: nothing is checked, batches are not ordered, and no worker waits for another.
    """
    from lit_lora.datamodules.indexing.open_table import open_table

    table = open_table(str(folder / "shards"))
    spans = [(table.locations[table.shard_of(sample)], *table.spans(sample)["jpg"]) for sample in range(len(table))]
    pools = [
        ProcessPoolExecutor(1, multiprocessing.get_context("fork"), start, (share,))
        for share in (spans[number::workers] for number in range(workers))
    ]
    return lambda: sum(future.result() for future in [pool.submit(read_share, batch_size) for pool in pools])


def read_share(batch_size: int) -> int:
    """Read, decode, resize and crop a worker's images into batches; return their number."""
    batch = torch.empty(batch_size, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for number, (path, offset, size) in enumerate(SHARE):
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            encoded = bytearray(size)
            file.readinto(encoded)
        batch[number % batch_size].copy_(frame(encoded))
    return len(SHARE)


def start(share: list[Any]) -> None:
    """Keep a worker's share, so that it is not sent in each pass."""
    global SHARE
    SHARE = share
    torch.set_num_threads(1)


def decode_share() -> int:
    return decode(SHARE)


SHARE: list[Any] = []


class Cost(NamedTuple):
    """Seconds of one pass: wall time and CPU time."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """CPU time that this process and its children have used so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if os.getpid() in (int(stat.parent.name), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(loaders: dict[str, Pass], count: int, rounds: int) -> dict[str, list[Cost]]:
    """Measure the cost of each pass; the first round warms up and is left out."""
    costs: dict[str, list[Cost]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, go in loaders.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            seen = go()
            cost = Cost(time.perf_counter() - wall, cpu_seconds() - cpu)
            if number:
                costs[name].append(cost)
            assert seen == count, f"{name} saw {seen} of {count} images"
        print(f"round {number} of {rounds}", file=sys.stderr)
    return costs


def table(costs: dict[str, list[Cost]], count: int) -> list[str]:
    """Lines of a table with the speed of each loader, compared with webdataset and with the limit."""
    lines = [
        f"{'':<12}{'images/s':>10}{'to webdataset':>16}{'of the limit':>15}{'CPU ms/image':>15}{'of the limit':>15}"
    ]
    for name, own in costs.items():
        speed = count / statistics.median(cost.wall for cost in own)
        ratio = statistics.median(b.wall / c.wall for b, c in zip(costs["webdataset"], own, strict=True))
        share = statistics.median(e.wall / c.wall for e, c in zip(costs["limit"], own, strict=True))
        cpu = 1000 * statistics.median(cost.cpu for cost in own) / count
        cpu_share = statistics.median(e.cpu / c.cpu for e, c in zip(costs["limit"], own, strict=True))
        lines.append(f"{name:<12}{speed:>10.1f}{ratio:>15.2f}x{share:>15.0%}{cpu:>15.2f}{cpu_share:>15.0%}")
    if "litdata" not in costs:
        lines.append(f"{'litdata':<12}  not installed")
    return lines


def run(options: argparse.Namespace, folder: Path) -> list[str]:
    """Lines of the report."""
    images = write_data(folder, options.images)
    lines = [
        "python " + " ".join(["benchmarks/data_throughput.py", *sys.argv[1:]]),
        f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, "
        + versions("torch", "torchvision", "lightning", "webdataset", "litdata", "pillow"),
        f"{len(images)} JPEGs of {np.mean([len(image) for image in images]) / 1000:.0f} KB mean, batches of"
        f" {options.batch_size}, {options.rounds} rounds",
    ]
    for workers in options.workers:
        loaders = {
            "ours": ours(folder, options.batch_size, workers),
            "webdataset": plain_webdataset(folder, options.batch_size, workers),
        }
        if find_spec("litdata"):
            loaders["litdata"] = litdata(folder, options.batch_size, workers)
        loaders["ImageFolder"] = image_folder(folder, options.batch_size, workers)
        loaders["limit"] = limit(images, workers)
        lines += ["", f"{workers} workers", *table(measure(loaders, len(images), options.rounds), len(images))]
    return lines


def processor() -> str:
    """Name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640, help="number of images")
    parser.add_argument("--rounds", type=int, default=5, help="measured passes of each loader")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers to measure")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", default="", help="file to write the report to as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = run(options, Path(folder))
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
