"""One of the gloo processes that shard frozen weights: ``python -m tests.callbacks.frozen_script FOLDER``.

The first one writes ``FOLDER/frozen.json``: the fingerprints of the full weights and those of the shards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_lora.callbacks.frozen_weights import frozen_weights
from tests.callbacks.test_frozen_weights import base


def main() -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    is_first = distributed.get_rank() == 0
    full, module = frozen_weights(base(), reads_full=is_first), base()
    fully_shard(module, mesh=mesh)
    sharded = frozen_weights(module, reads_full=is_first)
    if is_first:
        (Path(sys.argv[1]) / "frozen.json").write_text(json.dumps([full, sharded]))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
