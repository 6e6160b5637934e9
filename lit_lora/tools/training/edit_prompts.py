"""Prompts of editing pairs: instructions with the source images that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.indexing.extensions import SOURCE_EXTENSIONS
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.files import atomic_file

_FILE = "prompts.yaml"


def write_edit_prompts(shards: Sequence[str | Path], folder: Path, prefix: str, count: int) -> Path | None:
    """Write a file of prompts with the source images of pairs from the whole of the data beside it.

    Args:
        shards: Shards or their folders.
        folder: Folder of the file and the images.
        prefix: Text before each instruction.
        count: Number of prompts.

    Returns:
        Path of the file; None if a pair has no source.

    Raises:
        UserError: If a shard is missing or damaged.
    """
    table = open_table([str(one) for one in shards])
    reader, captions = ShardReader(table), Captions()
    prompts = []
    for number in range(count):
        members = reader.read(len(table) * number // count, (*captions.extensions, *SOURCE_EXTENSIONS))
        source = next((name for name in SOURCE_EXTENSIONS if name in members), None)
        if source is None:
            return None
        image = f"{number}.{source.rpartition('.')[2]}"
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / image) as part:
            part.write_bytes(members[source])
        caption = captions.draw(members, seed=0, slot=0)
        prompts.append({"prompt": prefix + caption if caption else prefix.removesuffix(", "), "image": image})
    with atomic_file(folder / _FILE) as part:
        part.write_text(yaml.safe_dump(prompts, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return folder / _FILE
