"""One of two processes that initialize an adapter by LoftQ: ``python -m tests.callbacks.loftq_script FOLDER MODEL SHARDS``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig

from lit_lora.callbacks import LoftqInitialization
from lit_lora.quantization import NF4
from tests.distributed import scenarios


def main() -> None:
    folder, model, shards = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for strategy in ("ddp", "lit_lora_fsdp"):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"])
        module = scenarios.module_of(model, config, quantization=NF4(block_size=16))
        seen, *_ = scenarios.train(
            strategy, model, shards, folder / strategy, module=module, callbacks=[LoftqInitialization()], max_steps=1
        )
        found[strategy] = seen.start
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
