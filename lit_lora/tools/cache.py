"""``lit-lora cache``: encode images and captions once, so that training loads neither VAE nor text encoders."""

from __future__ import annotations

import copy
import json
import posixpath
import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule

from lit_lora.datamodules.batches.buckets import Bucketing
from lit_lora.datamodules.caching.cache_writer import CachedShard
from lit_lora.datamodules.caching.latent_cache import DESCRIPTION, EMPTY, CacheDescription, size_name
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.indexing.scan import IMAGE_EXTENSIONS
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.bad_samples import BadSampleReport, list_reports
from lit_lora.datamodules.remote.transfer import is_remote, redact
from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, check_size, prepare
from lit_lora.families.parts import PARTS
from lit_lora.files import atomic_file, writable_folder
from lit_lora.lightning_cli import ToolCLI, build_cli
from lit_lora.module import LoraDiffusion
from lit_lora.tools.cache_work import CacheWork

UNFINISHED = "cache.unfinished.json"
"""The description of a cache that is being made; it becomes ``cache.json`` when all is there."""

_SHARDS = ("train_shards", "val_shards", "test_shards")


class CacheSummary(NamedTuple):
    """What caching made.

    Attributes:
        shards: The number of the cache's shards.
        resumed: How many of them were there already.
        samples: The number of samples in all of them.
        size: Their bytes.
        bad: What was left out.
        arguments: The datamodule's arguments by which a run reads from the cache.
    """

    shards: int
    resumed: int
    samples: int
    size: int
    bad: list[BadSampleReport]
    arguments: dict[str, str | list[str]]


def cache(arguments: list[str]) -> None:
    """Run ``lit-lora cache`` with the arguments of ``lit-lora fit`` and those of :func:`cache_shards`."""
    cli = build_cli(["fit", *arguments], run=False, cli_class=_CacheCLI)
    summary = cache_shards(cli.model, cli.datamodule, **cli.options)
    print(f"shards   {summary.shards} ({summary.resumed} were there already)")
    print(f"samples  {summary.samples}")
    print(f"size     {summary.size / 1e6:.1f} MB")
    print(f"left out {len(summary.bad)}" + (" (see bad.jsonl beside the cached shards)" if summary.bad else ""))
    print("\nNext:", shlex.join(["lit-lora", "fit", *cli.arguments_for_fit(arguments), *_options(summary.arguments)]))


def cache_shards(
    module: LoraDiffusion,
    data: LightningDataModule,
    out: str | None = None,
    text: bool = True,
    jobs: int = 1,
    batch_size: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> CacheSummary:
    """Write a cache of the latents, and of the captions' embeddings, of all shards of a datamodule.

    The cache has shards of the same names, with the same samples in the same order. A run that was cut short goes on where
    it was when it is started again; finished shards are kept.

    Args:
        module: Has the encoders.
        data: Has the shards.
        out: The folder for the cache; by default "cache" in the folder of the shards.
        text: Cache the captions' embeddings too; in bfloat16 they take 0.1 MB for each sample of Stable
            Diffusion, 0.3 MB of SDXL.
        jobs: Processes that encode, each a shard at a time; with several GPUs they take turns.
        batch_size: Images that a process encodes at a time.
        device: Where to encode; "auto" takes the GPUs if there are any.
        dtype: Precision of the cached latents; by default the VAE's, and float16 where that is float32.

    Raises:
        UserError: If what is trained cannot be cached; shards are missing or damaged; more samples than the datamodule's
            max_bad_samples are bad; or the folder holds something else.
    """
    if jobs < 1 or batch_size < 1:
        raise UserError(f"jobs and batch_size must be at least 1, not {jobs} and {batch_size}")
    data, decoder = _cacheable(data, text)
    specs = {name: getattr(data, name) for name in _SHARDS if getattr(data, name)}
    table = open_table([spec for named in specs.values() for spec in ([named] if isinstance(named, str) else named)])
    targets = _targets(table, out)
    table.check_complete("image", IMAGE_EXTENSIONS)
    table.check_complete("caption", decoder.captions.extensions)
    family = module.family.unloaded()  # what is loaded here, training does without
    prepare(family, copy.deepcopy(module.objective))
    family.load(module.base_dtype, without=PARTS)
    description = _describe(family, data, decoder, text, dtype)
    for folder in _folders(targets):
        _claim(folder, description, [path for path in targets if path.parent == folder])
    work = CacheWork(
        family,
        module.base_dtype,
        table,
        description,
        Bucketing.of(data.resolution, data.buckets),
        decoder.captions,
        batch_size,
        data.num_workers,
    )
    done = _write_shards(work, targets, jobs, device, data.max_bad_samples)
    _conclude(targets, description)
    kept = [shard for shard in done if shard.samples]
    return CacheSummary(
        len(kept),
        sum(shard.resumed for shard in kept),
        sum(shard.samples for shard in kept),
        sum(shard.path.stat().st_size for shard in kept),
        sorted(report for shard in done for report in shard.bad),
        {name: _cached_specs(named, out) for name, named in specs.items()},
    )


def _write_shards(
    work: CacheWork, targets: Mapping[Path, int], jobs: int, device: str, max_bad_samples: int
) -> list[CachedShard]:
    """Write all shards of the cache, and what is bad beside them, also where there is too much of it."""
    done: list[CachedShard] = []
    try:
        with closing(work.write_all(targets, jobs, device)) as shards:
            for shard in shards:
                done.append(shard)
                _check_bad(done, max_bad_samples)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has too little memory for batch_size={work.batch_size}; choose a smaller one"
        ) from error
    finally:
        for folder in _folders(targets):
            _write_bad(folder, done)
    return done


class _CacheCLI(ToolCLI):
    function = staticmethod(cache_shards)
    parts = frozenset({"module", "data"})

    def arguments_for_fit(self, arguments: Sequence[str]) -> list[str]:
        """The arguments without those for :func:`cache_shards`."""
        kept = []
        remaining = iter(arguments)
        for argument in remaining:
            name, equals, _ = argument.partition("=")
            if name.removeprefix("--") not in self.options:
                kept.append(argument)
            elif not equals:
                next(remaining)
        return kept


def _cacheable(data: LightningDataModule, text: bool) -> tuple[WebDatasetDataModule, ImageDecoder]:
    if not isinstance(data, WebDatasetDataModule):
        raise UserError(f"data is a {type(data).__name__}; only the shards of a WebDatasetDataModule can be cached")
    decoder = data.decoder
    if type(decoder) is not ImageDecoder:  # a subclass may make something else of a sample
        raise UserError(f"decoder is a {type(decoder).__name__}; only the samples of an ImageDecoder can be cached")
    if not decoder.center_crop:
        raise UserError(
            "decoder.center_crop is false: each showing crops a random place, which cannot be cached; set"
            " --data.init_args.decoder.center_crop true, for the cache and for training"
        )
    if text and not decoder.captions.fixed:
        raise UserError(
            "captions differ from showing to showing (dropout, shuffle_tags or weights), so their embeddings cannot be"
            " cached; cache latents only (--text false), or take these options out of captions (model.caption_dropout"
            " drops cached captions too)"
        )
    if not any(getattr(data, name) for name in _SHARDS):
        raise UserError(f"there is nothing to cache; set {', '.join(_SHARDS)}")
    return data, decoder


def _targets(table: SampleTable, out: str | None) -> dict[Path, int]:
    """The shards of the cache, and the number in the table of the shard of each."""
    targets: dict[Path, int] = {}
    for number, location in enumerate(table.locations):
        folder, name = posixpath.split(location.partition("?")[0] if is_remote(location) else location)
        if out is None and is_remote(location):
            raise UserError(f"{redact(location)} is not on a local disk; say where its cache goes by --out")
        if not is_remote(location) and (Path(folder) / DESCRIPTION).exists():
            raise UserError(f"{folder} is a cache already; name the shards that it was made of")
        path = (Path(folder) / "cache" if out is None else Path(out)) / name
        other = table.locations[targets.setdefault(path, number)]
        if other != location:
            raise UserError(f"{redact(location)} and {redact(other)} have the same name; cache them to two folders")
    return targets


def _folders(targets: Mapping[Path, int]) -> list[Path]:
    return list(dict.fromkeys(path.parent for path in targets))


def _describe(
    family: ModelFamily, data: WebDatasetDataModule, decoder: ImageDecoder, text: bool, dtype: str | None
) -> CacheDescription:
    identity = family.identity()
    if missing := {"vae", *(["text"] if text else [])} - identity.keys():
        raise UserError(
            f"{family.source} has no weights for {' and '.join(sorted(missing))}"
            + (f" (variant {family.source.variant})" if family.source.variant else "")
        )
    sizes = [(int(height), int(width)) for height, width in Bucketing.of(data.resolution, data.buckets).sizes.tolist()]
    for size in sizes:
        check_size(family, *size)
    own = str(family.vae_dtype).removeprefix("torch.")
    return CacheDescription(
        vae=identity["vae"],
        resolution=data.resolution,
        buckets=None if data.buckets is None else data.buckets.description(),
        center_crop=True,
        flipped=decoder.random_flip,
        dtype=dtype or ("float16" if own == "float32" else own),
        latent_shapes={size_name(*size): family.latent_shape(*size) for size in sizes},
        encoders=identity["text"] if text else None,
        captions=decoder.captions.description() if text else None,
        text_masks=dict(family.text_masks) if text else {},
    )


def _claim(folder: Path, description: CacheDescription, paths: list[Path]) -> None:
    """Make sure that what the folder holds is a part of the same cache, and mark it as unfinished."""
    writable_folder(folder)
    for path in paths:
        for left_over in folder.glob(f"{path.name}.*.part"):
            left_over.unlink()
    if any(folder.glob("*.tar")):
        _check_same(folder, description)
    else:
        (folder / EMPTY).unlink(missing_ok=True)
    if not all(path.exists() for path in paths):
        description.write(folder, UNFINISHED)
        (folder / DESCRIPTION).unlink(missing_ok=True)


def _check_same(folder: Path, description: CacheDescription) -> None:
    found = [name for name in (DESCRIPTION, UNFINISHED) if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder} holds shards that are no cache; name another folder by --out")
    for name in found:
        if differences := CacheDescription.read(folder, name).differences(description):
            raise UserError(
                f"{folder} holds a cache of something else:\n  "
                + "\n  ".join(differences)
                + "\nname another folder by --out, or remove this one"
            )


def _check_bad(done: list[CachedShard], max_bad_samples: int) -> None:
    bad = [report for shard in done for report in shard.bad]
    if len(bad) > max_bad_samples:
        raise UserError(
            f"{len(bad)} bad samples, more than max_bad_samples={max_bad_samples}; mend them or raise"
            f" --data.init_args.max_bad_samples:{list_reports(bad)}"
        )


def _write_bad(folder: Path, done: list[CachedShard]) -> None:
    reports = sorted(report for shard in done if shard.path.parent == folder for report in shard.bad)
    with atomic_file(folder / "bad.jsonl") as part:
        part.write_text("".join(json.dumps(report._asdict()) + "\n" for report in reports), encoding="utf-8")


def _conclude(targets: Mapping[Path, int], description: CacheDescription) -> None:
    """Index the cache; its description comes last, so that nobody reads a part of it."""
    for folder in _folders(targets):
        paths = [path for path in targets if path.parent == folder and path.exists()]
        if not paths:
            raise UserError(f"all samples are bad; see {folder / 'bad.jsonl'}")
        DataIndex.load_or_build(paths)
        description.write(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)


def _cached_specs(named: str | list[str], out: str | None) -> str | list[str]:
    if not isinstance(named, str):
        return [str(_cached_specs(spec, out)) for spec in named]
    if not is_remote(named) and Path(named).expanduser().is_dir():
        return str(Path(named) / "cache" if out is None else out)
    folder, name = posixpath.split(named.partition("?")[0] if is_remote(named) else named)
    return str((Path(folder) / "cache" if out is None else Path(out)) / name)


def _options(arguments: Mapping[str, str | list[str]]) -> list[str]:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in arguments.items()}
    return [part for name, text in texts.items() for part in (f"--data.init_args.{name}", text)]
