"""One of two gloo processes that map the same file: ``python -m tests.distributed.node_script FOLDER``.

Each process writes what it has seen to ``FOLDER/rank-N.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from lit_lora.distributed.node import Node
from lit_lora.mapped import is_mapped
from tests.helpers import largest_file


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    node = Node(2, folder=folder / "mapped")
    values = {"large": torch.arange(100_000).bfloat16(), "small": torch.arange(9.0)} if rank == 0 else {}
    read = node.read(lambda: values, may_be_mapped=True)
    in_memory = node.read(lambda: values)
    found = {
        "equal": [bool((read[name] == in_memory[name]).all()) for name in ("large", "small")],
        "mapped": [is_mapped(one[name]) for one in (read, in_memory) for name in ("large", "small")],
        "left": os.listdir(folder / "mapped"),
    }
    distributed.barrier()
    if rank == 1:
        read["large"].fill_(3)
    distributed.barrier()
    found |= sent_together(node, rank)
    found["seen"] = [float(read["large"].float().mean()), float(in_memory["large"].float().mean())]
    try:
        with largest_file(1000):
            node.read(lambda: values, may_be_mapped=True)
    except OSError as error:
        found["error"] = error.strerror
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def sent_together(node: Node, rank: int) -> dict[str, Any]:
    """Whether small tensors of several dtypes arrive, and in how many messages; a large one between them is sent by itself."""
    generator = torch.Generator().manual_seed(5)
    dtypes = (torch.float32, torch.bool, torch.bfloat16, torch.int64)
    values = {f"{i}": torch.randint(2, (i % 5,), generator=generator).to(dtypes[i % 4]) for i in range(40)}
    values["20"] = torch.rand(5_000_000, generator=generator)
    values["30"] = torch.tensor(7, dtype=torch.int32)
    messages: list[int] = []
    broadcast = distributed.broadcast

    def counted(tensor: torch.Tensor, *arguments: Any) -> None:
        messages.append(tensor.nbytes)
        broadcast(tensor, *arguments)

    distributed.broadcast = counted
    try:
        read = node.read(lambda: values if rank == 0 else {})
    finally:
        distributed.broadcast = broadcast
    arrived = list(read) == list(values) and all(
        read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in values.items()
    )
    return {"arrived": arrived, "messages": messages}


if __name__ == "__main__":
    main()
