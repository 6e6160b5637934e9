"""Images per second of this project's loader and of others: ``python benchmarks/data_throughput.py``.

All read the same JPEGs (made here, 512 to 768 px, quality 90), resize the short side to 512, crop the middle, and make
batches, each with the same number of workers (ours are threads, the others' processes), one torch thread in each:

- ours: ``WebDatasetDataModule``.
- webdataset: its pipeline with PIL's decode and the usual torchvision transforms on PIL images.
- litdata: a ``StreamingDataset`` that was optimized before; its own decode, then the same transforms on tensors.
- ImageFolder: torchvision's, with the same transforms on PIL images.
- limit: torchvision's decode, resize and crop of bytes in memory, in as many processes, and nothing else.

They take turns pass by pass, so that a machine whose speed drifts slows all of them. A ratio is the median of those of
the rounds. The time of all processors together says more than the clock where others use the machine. Files are in the
page cache; each contender has had a pass to warm up.
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
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from lit_lora.datamodules import Chunks, ImageDecoder, WebDatasetDataModule

SIDE = 512
SHARDS = 8
Pass = Callable[[], int]
"""Goes through all images once and says how many they were."""


def make_picture(number: int) -> bytes:
    """A JPEG with the spectrum of a photograph, and edges: about 140 KB."""
    random = np.random.default_rng(number)
    width, height = (int(n) for n in random.integers(SIDE, 769, 2))
    noise = torch.Generator().manual_seed(number)
    picture = torch.zeros(1, 3, height, width)
    for level in range(8):
        grey, colour = torch.randn(2, 1, 3, max(2, height >> level), max(2, width >> level), generator=noise)
        octave = F.interpolate(grey[:, :1] + 0.3 * colour, (height, width), mode="bilinear")
        picture += octave * 4.7 * 1.3**level
    for _ in range(12):
        top, left = int(random.integers(height - 64)), int(random.integers(width - 64))
        box = picture[..., top : top + int(random.integers(32, 256)), left : left + int(random.integers(32, 256))]
        box += torch.tensor(random.normal(0, 40, (3, 1, 1)), dtype=torch.float32)
    pixels = (picture[0] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_data(folder: Path, count: int) -> list[bytes]:
    """Shards in ``shards``, single files in ``files/all``."""
    import webdataset

    pictures = [make_picture(number) for number in range(count)]
    (folder / "files" / "all").mkdir(parents=True)
    (folder / "shards").mkdir()
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / "shards" / f"{shard:06}.tar")) as writer:
            for number in range(shard, count, SHARDS):
                writer.write({"__key__": f"{number:06}", "jpg": pictures[number], "txt": f"picture {number}"})
    for number, picture in enumerate(pictures):
        (folder / "files" / "all" / f"{number:06}.jpg").write_bytes(picture)
    return pictures


def ours(folder: Path, batch_size: int, workers: int) -> Pass:
    data = WebDatasetDataModule(
        str(folder / "shards"),
        batch_size=batch_size,
        resolution=SIDE,
        decoder=ImageDecoder(center_crop=True),
        chunks=Chunks(leftovers="pad"),
        num_workers=workers,
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: sum(int(batch["weight"].sum()) for batch in loader)


def usual_transform() -> Any:
    """What people write for PIL images."""
    steps = [
        transforms.Resize(SIDE, InterpolationMode.BICUBIC),
        transforms.CenterCrop(SIDE),
        transforms.ToTensor(),
    ]
    return transforms.Compose(steps)


def tensor_transform() -> Any:
    """The same for uint8 tensors, by the faster of torchvision's two implementations."""
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
    return {"image": Image.open(path), "caption": f"picture {Path(path).stem}"}


def image_folder(folder: Path, batch_size: int, workers: int) -> Pass:
    dataset = ImageFolder(str(folder / "files"), usual_transform())
    return of_loader(loader(dataset, batch_size, workers, shuffle=True))


def loader(dataset: Any, batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, num_workers=workers, persistent_workers=workers > 0, **options)


def of_loader(batches: Iterable[Any]) -> Pass:
    return lambda: sum(len(images) for images, _ in batches)


def decode(pictures: list[bytes]) -> int:
    for picture in pictures:
        image = decode_image(torch.frombuffer(bytearray(picture), dtype=torch.uint8), ImageReadMode.RGB)
        v2.center_crop(v2.resize(image, [SIDE], InterpolationMode.BICUBIC, antialias=True), [SIDE, SIDE])
    return len(pictures)


def limit(pictures: list[bytes], workers: int) -> Pass:
    if not workers:
        return lambda: decode(pictures)
    pools = [
        ProcessPoolExecutor(1, multiprocessing.get_context("fork"), start, (share,))
        for share in split(pictures, workers)
    ]
    return lambda: sum(future.result() for future in [pool.submit(decode_share) for pool in pools])


def split(pictures: list[bytes], count: int) -> list[list[bytes]]:
    return [pictures[number::count] for number in range(count)]


def start(share: list[bytes]) -> None:
    """Keep a worker's pictures, so that they are not sent at each pass."""
    global SHARE
    SHARE = share
    torch.set_num_threads(1)


def decode_share() -> int:
    return decode(SHARE)


SHARE: list[bytes] = []


class Cost(NamedTuple):
    """Seconds of one pass: by the clock, and of all processors together."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """What this process and its children have used so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if os.getpid() in (int(stat.parent.name), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(contenders: dict[str, Pass], count: int, rounds: int) -> dict[str, list[Cost]]:
    """The cost of each pass."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, go in contenders.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            seen = go()
            cost = Cost(time.perf_counter() - wall, cpu_seconds() - cpu)
            if number:
                costs[name].append(cost)
            assert seen == count, f"{name} saw {seen} of {count} images"
        print(f"round {number} of {rounds}", file=sys.stderr)
    return costs


def table(costs: dict[str, list[Cost]], count: int) -> list[str]:
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


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def run(options: argparse.Namespace, folder: Path) -> list[str]:
    pictures = write_data(folder, options.images)
    packages = ("torch", "torchvision", "lightning", "webdataset", "litdata", "pillow")
    lines = [
        "python " + " ".join(["benchmarks/data_throughput.py", *sys.argv[1:]]),
        f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, "
        + ", ".join(installed(name) for name in packages),
        f"{len(pictures)} JPEGs of {np.mean([len(p) for p in pictures]) / 1000:.0f} KB mean, batches of"
        f" {options.batch_size}, {options.rounds} rounds",
    ]
    for workers in options.workers:
        contenders = {
            "ours": ours(folder, options.batch_size, workers),
            "webdataset": plain_webdataset(folder, options.batch_size, workers),
        }
        if find_spec("litdata"):
            contenders["litdata"] = litdata(folder, options.batch_size, workers)
        contenders["ImageFolder"] = image_folder(folder, options.batch_size, workers)
        contenders["limit"] = limit(pictures, workers)
        lines += ["", f"{workers} workers", *table(measure(contenders, len(pictures), options.rounds), len(pictures))]
    return lines


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", default="", help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = run(options, Path(folder))
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
