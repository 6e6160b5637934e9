"""``lit-lora cache``: encode images and captions once, so that training loads neither VAE nor text encoders."""

from __future__ import annotations

import copy
import json
import posixpath
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from lightning.pytorch import LightningDataModule

from lit_lora.datamodules.batches.buckets import Bucketing
from lit_lora.datamodules.caching.cache_writer import CachedShard
from lit_lora.datamodules.caching.latent_cache import DESCRIPTION, EMPTY, CacheDescription, size_name
from lit_lora.datamodules.caching.of_run import is_cacheable
from lit_lora.datamodules.caching.sources import record_path
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.manifest import MANIFEST, rows_of, write_manifest
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.bad_samples import BadSampleReport, list_reports
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule
from lit_lora.described import described
from lit_lora.distributed.jobs import check_workers
from lit_lora.errors import UserError, check_least
from lit_lora.families import ModelFamily, check_size, prepare
from lit_lora.families.parts import PARTS
from lit_lora.files import atomic_file, remove_parts, writable_folder
from lit_lora.folder_lock import only_run_in
from lit_lora.lightning_cli import ToolCLI, build_cli
from lit_lora.module import LoraDiffusion
from lit_lora.planning.cache_plan import BATCH_SIZE
from lit_lora.redact import redact
from lit_lora.report_text import format_written
from lit_lora.tools.cache_work import CacheWork

UNFINISHED = "cache.unfinished.json"
"""Name of the description while a cache is being made; a complete cache has ``cache.json`` instead."""

_BAD = "bad.jsonl"
_SHARDS = ("train_shards", "val_shards", "test_shards")


class CacheSummary(NamedTuple):
    """Result of making a cache.

    Attributes:
        shards: Number of shards in the cache.
        resumed: Number of shards that an earlier run had written.
        samples: Number of samples in the cache.
        size: Size of the shards in bytes.
        bad: Reports of the bad samples that were left out.
        arguments: Arguments of the datamodule that make a run read from the cache; for ``train_sets`` the shards of each set.
    """

    shards: int
    resumed: int
    samples: int
    size: int
    bad: list[BadSampleReport]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, written: Sequence[CachedShard], arguments: dict[str, Any]) -> Self:
        """Summarize written shards; shards without samples are not part of the cache."""
        kept = [shard for shard in written if shard.samples]
        return cls(
            len(kept),
            sum(shard.resumed for shard in kept),
            sum(shard.samples for shard in kept),
            sum(shard.path.stat().st_size for shard in kept),
            sorted(report for shard in written for report in shard.bad),
            arguments,
        )


def cache(arguments: list[str]) -> None:
    """Run ``lit-lora cache`` with the arguments of ``lit-lora fit`` and those of :func:`cache_shards`."""
    cli = build_cli(["fit", *arguments], run=False, cli_class=_CacheCLI)
    summary = cache_shards(cli.model, cli.datamodule, **cli.options)
    numbers = (summary.shards, summary.resumed, summary.samples, summary.size, len(summary.bad))
    print(format_written(*numbers, "bad.jsonl beside the cached shards"))
    if "train_sets" in (named := summary.arguments):
        sets = cli.config["data"]["init_args"]["train_sets"]
        named["train_sets"] = [_set_of_cache(*pair) for pair in zip(sets, named["train_sets"], strict=True)]
    fit = ["lit-lora", "fit", *cli.arguments_for_fit(arguments, named), *_options(named)]
    print(f"\nNext:\n{shlex.join(fit)}")


def cache_shards(
    module: LoraDiffusion,
    data: LightningDataModule,
    out: str | None = None,
    text: bool = True,
    jobs: int = 1,
    batch_size: int = BATCH_SIZE,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> CacheSummary:
    """Encode the images and captions of a datamodule's shards once, so that training needs no VAE and no text encoders.

    The cache has shards of the same names, with the same samples in the same order. An interrupted run continues when it is
    started again; complete shards are kept, unless their source is another one now, which is an error.

    Args:
        module: Module that has the encoders.
        data: Datamodule that names the shards.
        out: Folder of the cache; defaults to "cache" in the folder of the shards. Of train_sets, each has a folder in it, with
            the set's number from 0.
        text: Whether to cache text embeddings too. In bfloat16 they take 0.1 MB per sample for Stable Diffusion and 0.3 MB
            for SDXL.
        jobs: Number of processes that encode, each one shard at a time; they are spread evenly over the GPUs.
        batch_size: Number of images that a process encodes at a time.
        device: Device that encodes; "auto" uses all GPUs, or the CPU if there is none.
        dtype: dtype of the cached latents; defaults to the VAE's dtype, or to float16 if that is float32.

    Raises:
        UserError: If the samples cannot be cached, the text encoders are trained, shards are missing or damaged, more than
            max_bad_samples samples are bad, the folder holds something else, or another run caches into it.
    """
    check_least(1, jobs=jobs, batch_size=batch_size)
    check_workers(jobs=jobs)
    if text:
        module.text_training.check_cached({"text"})
    parts = _parts(data, text, out)
    written: list[CachedShard] = []
    arguments: dict[str, Any] = {}
    for part in parts:
        written += _cache_part(module, part, text, jobs, batch_size, device, dtype, written)
        cached = {name: _cached_specs(named, part.out) for name, named in part.shards.items()}
        if part.of_sets:
            arguments.setdefault("train_sets", []).append(cached["train_shards"])
        else:
            arguments |= cached
    return CacheSummary.of(written, arguments)


class _Part(NamedTuple):
    """Shards that are cached with the same captions: all of a datamodule, or one of its sets.

    Attributes:
        data: Datamodule.
        decoder: Decoder of the samples.
        shards: The shards, by the name of the datamodule's argument.
        out: Folder of the cache; None for one beside the shards.
        of_sets: Whether it is one of several sets.
    """

    data: WebDatasetDataModule
    decoder: ImageDecoder
    shards: dict[str, str | list[str]]
    out: str | None
    of_sets: bool


def _parts(data: LightningDataModule, text: bool, out: str | None) -> list[_Part]:
    """What is to be cached, after checking that it can be."""
    if not isinstance(data, WebDatasetDataModule):
        raise UserError(f"data is a {type(data).__name__}, which cannot be cached; use a WebDatasetDataModule")
    parts = []
    if specs := {name: named for name in _SHARDS if (named := getattr(data, name))}:
        parts.append(_Part(data, _cacheable(data.decoder, text), specs, out, of_sets=False))
    for number, one in enumerate(data.train_sets or ()):
        folder = None if out is None else str(Path(out) / str(number))
        decoder = _cacheable(one.decoder or data.decoder, text)
        parts.append(_Part(data, decoder, {"train_shards": one.shards}, folder, of_sets=True))
    if not parts:
        raise UserError(f"there is nothing to cache; set {', '.join((*_SHARDS, 'train_sets'))}")
    return parts


def _cache_part(
    module: LoraDiffusion,
    part: _Part,
    text: bool,
    jobs: int,
    batch_size: int,
    device: str,
    dtype: str | None,
    before: Sequence[CachedShard],
) -> list[CachedShard]:
    data, decoder = part.data, part.decoder
    specs = [spec for named in part.shards.values() for spec in ([named] if isinstance(named, str) else named)]
    table = open_table(specs, refresh=True)
    targets = _targets(table, part.out)
    for what, extensions in decoder.required.items():
        table.check_complete(what, extensions)
    family = module.family.unloaded()
    prepare(family, copy.deepcopy(module.objective))
    family.load(module.base_dtype, without=PARTS)
    description = _describe(family, data, decoder, text, dtype)
    buckets, workers = Bucketing.of(data.resolution, data.buckets), data.num_workers
    work = CacheWork(family, module.base_dtype, table, description, buckets, decoder.captions, batch_size, workers)
    with ExitStack() as locks:
        for folder in _folders(targets):
            locks.enter_context(only_run_in(folder, "cache"))
            _claim(folder, description, [path for path in targets if path.parent == folder])
        most = data.max_bad_samples - sum(len(shard.bad) for shard in before)
        written = _write_shards(work, targets, jobs, device, most)
        _complete(targets, description)
    return written


def _write_shards(
    work: CacheWork, targets: Mapping[Path, int], jobs: int, device: str, max_bad_samples: int
) -> list[CachedShard]:
    """Write all shards of the cache, and reports of bad samples beside them, even if there are too many of these."""
    done: list[CachedShard] = []
    try:
        with closing(work.write_all(targets, jobs, device)) as shards:
            for shard in shards:
                done.append(shard)
                _check_bad(done, max_bad_samples)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has too little memory for batch_size={work.batch_size}; choose a smaller batch_size"
        ) from error
    finally:
        for folder in _folders(targets):
            _write_bad(folder, done)
    return done


class _CacheCLI(ToolCLI):
    command = "lit-lora cache"
    function = staticmethod(cache_shards)
    parts = frozenset({"module", "data"})

    def arguments_for_fit(self, arguments: Sequence[str], replaced: Mapping[str, Any]) -> list[str]:
        """The arguments without the options of :func:`cache_shards`, and without those of the datamodule that are replaced."""
        kept = []
        remaining = iter(arguments)
        for argument in remaining:
            name, equals, _ = argument.partition("=")
            if name.removeprefix("--") not in self.options and name.removeprefix("--data.init_args.") not in replaced:
                kept.append(argument)
            elif not equals:
                next(remaining)
        return kept


def _cacheable(decoder: SampleDecoder, text: bool) -> ImageDecoder:
    """A decoder, after checking that what it makes can be cached."""
    if not is_cacheable(decoder):
        raise UserError(f"decoder is a {type(decoder).__name__}, whose samples cannot be cached; use an ImageDecoder")
    if not decoder.center_crop:
        raise UserError(
            "decoder.center_crop is false: each pass crops another part of the image, which cannot be cached; set"
            " --data.init_args.decoder.center_crop true, for the cache and for training"
        )
    if text and not decoder.captions.fixed:
        raise UserError(
            "captions differ from pass to pass (dropout, shuffle_tags, wildcards or weights), so their embeddings cannot be"
            " cached; cache only latents (--text false), or remove these options of captions (model.caption_dropout also drops"
            " cached captions)"
        )
    return decoder


def _targets(table: SampleTable, out: str | None) -> dict[Path, int]:
    """Paths of the cache's shards, each with the number of its source shard in the table."""
    targets: dict[Path, int] = {}
    for number, location in enumerate(table.locations):
        folder, name = posixpath.split(location.partition("?")[0] if is_remote(location) else location)
        if out is None and is_remote(location):
            raise UserError(f"{redact(location)} is not on a local disk; name the folder of its cache with --out")
        if not is_remote(location) and (Path(folder) / DESCRIPTION).exists():
            raise UserError(f"{folder} is a cache already; name the shards that it was made from")
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
    own = described(family.vae_dtype)
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
        mask=decoder.mask,
        pairs=decoder.pairs,
        background=decoder.background,
        text_quantization=identity.get("text_quantization") if text else None,
        vae_tiling=family.vae_tiling,
        base_dtype=described(family.dtype) if text or family.vae_dtype is family.dtype else None,
    )


def _claim(folder: Path, description: CacheDescription, paths: list[Path]) -> None:
    """Check that a folder holds nothing or a part of the same cache, and mark the cache as unfinished."""
    writable_folder(folder)
    _remove_left_overs(folder, paths)
    if any(folder.glob("*.tar")):
        _check_same(folder, description)
    else:
        (folder / EMPTY).unlink(missing_ok=True)
    if not all(path.exists() for path in paths):
        description.write(folder, UNFINISHED)
        for name in (DESCRIPTION, MANIFEST):
            (folder / name).unlink(missing_ok=True)


def _remove_left_overs(folder: Path, paths: list[Path]) -> None:
    beside = (DESCRIPTION, UNFINISHED, EMPTY, INDEX_NAME, MANIFEST, _BAD)
    remove_parts([*paths, *map(record_path, paths), *(folder / name for name in beside)])


def _check_same(folder: Path, description: CacheDescription) -> None:
    found = [name for name in (DESCRIPTION, UNFINISHED) if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder} holds shards that are not a cache; name another folder with --out")
    for name in found:
        if differences := CacheDescription.read(folder, name).differences(description):
            raise UserError(
                f"{folder} holds a cache that was made differently:\n  "
                + "\n  ".join(differences)
                + "\nname another folder with --out, or remove this one"
            )


def _check_bad(done: list[CachedShard], max_bad_samples: int) -> None:
    bad = [report for shard in done for report in shard.bad]
    if len(bad) > max_bad_samples:
        raise UserError(
            f"{len(bad)} bad samples, more than max_bad_samples={max_bad_samples}; repair them or raise"
            f" --data.init_args.max_bad_samples:{list_reports(bad)}"
        )


def _write_bad(folder: Path, done: list[CachedShard]) -> None:
    reports = sorted(report for shard in done if shard.path.parent == folder for report in shard.bad)
    with atomic_file(folder / _BAD) as part:
        part.write_text("".join(json.dumps(report._asdict()) + "\n" for report in reports), encoding="utf-8")


def _complete(targets: Mapping[Path, int], description: CacheDescription) -> None:
    """Index the cache, then write its description: a cache is read only if it has one, so never incomplete."""
    for folder in _folders(targets):
        paths = [path for path in targets if path.parent == folder and path.exists()]
        if not paths:
            raise UserError(f"all samples of {folder} are bad; see {folder / _BAD}")
        write_manifest(folder, rows_of(folder, DataIndex.load_or_build(paths)))
        description.write(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)
        _remove_left_overs(folder, paths)  # once more: the processes of a killed run end a moment after it


def _cached_specs(named: str | list[str], out: str | None) -> str | list[str]:
    """The shards argument of a datamodule, changed to name the cache."""
    if not isinstance(named, str):
        return [str(_cached_specs(spec, out)) for spec in named]
    if not is_remote(named) and Path(named).expanduser().is_dir():
        return str(Path(named) / "cache" if out is None else out)
    folder, name = posixpath.split(named.partition("?")[0] if is_remote(named) else named)
    return str((Path(folder) / "cache" if out is None else Path(out)) / name)


def _set_of_cache(options: Any, shards: str | list[str]) -> dict[str, Any]:
    """The options of a set, changed to name the cache; those that are not given are left out."""
    given = {name: value for name, value in options.as_dict().items() if value not in (None, False)}
    return given | {"shards": shards}


def _options(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of the datamodule as options of the command line."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in arguments.items()}
    return [part for name, text in texts.items() for part in (f"--data.init_args.{name}", text)]
