"""Commands for shards."""

from __future__ import annotations


def pack(
    folder: str,
    out: str,
    samples_per_shard: int = 10_000,
    max_shard_bytes: int = 1_000_000_000,
    jobs: int = 1,
    shuffle_seed: int | None = None,
    max_bad: int = 0,
    caption_key: str = "caption",
    prefix: str = "shard",
) -> None:
    """Pack a folder of images with captions into tar shards.

    The bytes of the shards depend on the input and the options, not on the number of jobs. A run that was cut short
    goes on where it was when it is started again.

    Args:
        folder: Images with a .txt or .json of the same name, at any depth; or images with a metadata.jsonl.
        out: The folder for the shards.
        samples_per_shard: The most samples in a shard.
        max_shard_bytes: The most bytes in a shard; only a single sample may exceed it.
        jobs: Processes that pack, each a shard at a time.
        shuffle_seed: Pack in the random order of this seed; otherwise sorted by name.
        max_bad: So many files may be left out, because they are damaged or have no caption.
        caption_key: The key of the caption in .json files.
        prefix: How the names of the shards begin.
    """
    from lit_lora.datamodules.pack import pack_folder

    summary = pack_folder(
        folder,
        out,
        samples_per_shard=samples_per_shard,
        max_shard_bytes=max_shard_bytes,
        jobs=jobs,
        shuffle_seed=shuffle_seed,
        max_bad=max_bad,
        caption_key=caption_key,
        prefix=prefix,
    )
    print(f"shards   {summary.shards} ({summary.resumed} were there already)")
    print(f"samples  {summary.samples}")
    print(f"size     {summary.size / 1e6:.1f} MB")
    print(f"left out {len(summary.bad)}" + (f" (see {summary.folder / 'bad.jsonl'})" if summary.bad else ""))
    print(f"\nNext: lit-lora fit --config configs/sd15.yaml --data.init_args.train_shards {summary.folder}")
