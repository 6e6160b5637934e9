"""Makes once what every forked process with a command's config would make anew: the parsers of the classes that it names."""

from __future__ import annotations

from contextlib import redirect_stdout, suppress
from io import StringIO

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lit_lora.lightning_cli import build_cli
from tests.quick_configs import read_classes_once

read_classes_once()
_CONFIG = [
    *("fit", "--print_config", "--trainer.callbacks+=AdapterCheckpoint", "--trainer.logger=CSVLogger"),
    *("--model.family=StableDiffusion", "--model.adapter=LoraConfig", "--data=WebDatasetDataModule"),
]
with redirect_stdout(StringIO()), suppress(SystemExit):  # it ends once the config is printed
    build_cli(
        [*_CONFIG, "--model.family.pretrained_model_name_or_path=x", "--data.train_shards=x", "--data.batch_size=1"]
    )
get_checkpoint_conversion_mapping("clip_text_model")  # compiles a thousand patterns for the first model that is loaded
