"""One of two processes that initialize an adapter from data: ``python -m tests.callbacks.rebased_script FOLDER MODEL SHARDS``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig

from lit_lora.callbacks import CordaInitialization, LoraGaInitialization
from tests.distributed import scenarios


def main() -> None:
    folder, model, shards = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for kind in (CordaInitialization, LoraGaInitialization):
        runs = found[kind.__name__] = {}
        for name, resume in (("whole", None), ("resumed", folder / kind.__name__ / "2.ckpt")):
            module = scenarios.module_of(model, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"]))
            scenarios.train(
                "ddp",
                model,
                shards,
                folder / kind.__name__,
                module=module,
                callbacks=[kind(steps=2), scenarios.saving(folder / kind.__name__, 2)],
                resume=resume,
                max_steps=4,
            )
            runs[name] = {name: value.detach().clone() for name, value in module.family.denoiser.named_parameters()}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
