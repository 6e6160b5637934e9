"""One of several gloo processes: ``python -m tests.distributed.cluster_script FOLDER MODEL:… SHARDS STRATEGY …``.

Each process has the model of its rank. More than two only train, and go on from the checkpoint of a single one.

Each process writes what it has seen to ``FOLDER/rank-N.json``; a scenario that raises gives its error there.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_lora.errors import UserError
from tests.distributed import scenarios
from tests.distributed.scenarios import FEATURES, OF_FOUR, SAVED_AT, STRATEGIES


def main() -> None:
    folder, shards = Path(sys.argv[1]), Path(sys.argv[3])
    model = Path(sys.argv[2].split(":")[int(os.environ["RANK"])])
    names = sys.argv[4:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.nn.Parameter.__repr__ = object.__repr__  # type: ignore[assignment]  # ZeRO-3 spells out all and prints none
    results: dict[str, Any] = {}

    def do(key: str, scenario: Callable[..., Any], name: str, *arguments: Any) -> None:
        strategy = copy.deepcopy((STRATEGIES | OF_FOUR)[name])  # it is of one run
        gc.freeze()  # the libraries: strategies that collect garbage take a second each time
        try:
            results[key] = scenario(strategy, model, shards, folder / key.replace("/", "-"), *arguments)
        except UserError as error:
            results[key] = {"refused": str(error)}
        except Exception:
            results[key] = {"error": traceback.format_exc()}
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))

    for name in names:
        do(f"{name}/train", scenarios.losses_and_checkpoint, name)
    saved = {name: folder / f"{name}-train" / f"{SAVED_AT}.ckpt" for name in names} | {
        "single": folder / "single-train" / f"{SAVED_AT}.ckpt"
    }
    if scenarios.WORLD > 2:
        for name in names:
            do(f"{name}/from/single", scenarios.resumed, name, folder.parent / "single-train" / f"{SAVED_AT}.ckpt")
        return
    for name in names:
        for source in scenarios.sources(name):
            do(f"{name}/from/{source}", scenarios.resumed, name, saved[source])
        do(f"{name}/rewritten", scenarios.rewritten, name, saved["single"])
        for feature in FEATURES:

            def with_feature(*arguments: Any, feature: str = feature) -> Any:
                return scenarios.with_feature(feature, *arguments)

            do(f"{name}/{feature}", with_feature, name)


if __name__ == "__main__":
    main()
