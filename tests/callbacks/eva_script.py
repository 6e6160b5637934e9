"""One of two processes that initialize an adapter by EVA: ``python -m tests.callbacks.eva_script FOLDER MODEL SHARDS``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig

from lit_lora.callbacks import AdapterEMA, EvaInitialization
from tests.distributed import scenarios


def main() -> None:
    folder, model, shards = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for strategy in ("ddp", "lit_lora_fsdp", "lit_lora_deepspeed_stage_3"):
        average = [] if "deepspeed" in strategy else [AdapterEMA(0.9)]
        found = {}
        for name, resume in (("adapter", None), ("resumed", folder / strategy / "2.ckpt")):
            module = scenarios.module_of(model, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"]))
            callbacks = [EvaInitialization(steps=2), *average, scenarios.saving(folder / strategy, 2)]
            scenarios.train(
                strategy,
                model,
                shards,
                folder / strategy,
                module=module,
                callbacks=callbacks,
                resume=resume,
                max_steps=4,
            )
            found[name] = scenarios.adapter(module)
        torch.save(found, folder / strategy / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
