"""``lit-lora train``: from a folder of images to a finished adapter."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lit_lora.config_files import check_options
from lit_lora.errors import UserError
from lit_lora.first_imports import first_imports
from lit_lora.option_names import SHORT

if TYPE_CHECKING:
    from lit_lora.tools.training.request import Request

# Nothing heavy is imported here: jsonargparse would import it for --help.

_OF_FIT = ("--trainer.", "--model.", "--data.", "--seed_everything")

_LONG = {f"--{name}": f"--{path}" for name, path in SHORT.items()}

_CLASSES = re.compile(
    r"(--(?:data|model\.(?:family|adapter|text_adapter|optimizer|lr_scheduler|objective|quantization)))\."
    r"(?!(?:init_args|dict_kwargs)(?:\.|$)|class_path$)"
)
"""Keys whose values are classes; before the names of their options, ``init_args`` may be left out."""

_FOR_EACH = ("--repeats", "--sources")
"""Options that take a value for each of several folders."""

_EPILOG = (
    f"Options of lit-lora fit may follow and win over what is chosen, such as --trainer.devices 2; {', '.join(_LONG)} are"
    " short for those of trainer, adapter, optimizer and data."
)


def train_command(arguments: list[str]) -> None:
    """Run ``lit-lora train`` with its own options and those of ``lit-lora fit``."""
    from lit_lora.tools import ToolParser, run_tool

    class Parser(ToolParser):
        """Has no ``--config``, which this command writes instead."""

        further = frozenset(option.removeprefix("--").partition(".")[0] for option in (*_LONG, *_OF_FIT))

        def add_argument(self, *names: Any, **options: Any) -> Any:
            return None if names[:1] == ("--config",) else super().add_argument(*names, **options)

    own, given = split_arguments(arguments)
    check_options([f"--{name}={json.dumps(value)}" for name, value in given.items()])
    request: Request = run_tool(train, own, "lit-lora train", epilog=_EPILOG, parser_class=Parser)
    with first_imports():
        from lit_lora.tools.training.run import train_adapter

    train_adapter(request._replace(given=given))


def train(
    folder: str | list[str],
    base: str | None = None,
    trigger: str | None = None,
    captions: Literal["auto", "files", "names", "folders", "trigger"] = "auto",
    out: str | None = None,
    device: str | None = None,
    device_memory: str | None = None,
    cache: bool = True,
    max_bad: float = 0.1,
    sources: str | list[str] | None = None,
    repeats: float | list[float] | None = None,
    class_images: str | None = None,
    dry_run: bool = False,
) -> Request:
    """Train an adapter on a folder of images, with settings chosen for the images, the base and the memory of the device.

    The folder is packed into shards. What is chosen, and why, is shown and written to config.yaml in the run's folder, with which
    lit-lora fit repeats the run. The same command resumes a run that was stopped or killed.

    Args:
        folder: Folder of images, or of what lit-lora shards pack takes: tables, tar shards, parquet files; or several sets, as
            several folders one after the other, folders named 10_name, or a dataset.toml of kohya's scripts.
        base: Name such as sd15, sdxl, flux_dev or embedded; or a folder, hub id or .safetensors file, whose family is found.
        trigger: Words that stand for what is learned, such as "sks dog"; they go before each caption.
        captions: Source of captions: files beside the images or a metadata file; names of the images' files; names of their
            folders; or the trigger alone. auto takes files if there are any, and otherwise the trigger.
        out: Folder of the run; defaults to runs/FOLDER-BASE.
        device: Device to plan for: cpu, or a GPU such as "RTX 3060"; defaults to the device of this machine.
        device_memory: Memory of the device, in GB or with a unit; defaults to what is free on the device.
        cache: Whether to encode images and captions once, before training.
        max_bad: Maximum number of images that may be left out because they are damaged; below 1, their share of the images,
            rounded up. What is left out is named.
        sources: Folder of the source images of editing pairs, named like their targets in the folder to train on; for bases
            such as flux_kontext. Of several sets, one folder for each.
        repeats: Number of times that a pass shows the images of each set, such as 3 1 for two folders; defaults to the number
            in the name of a folder such as 10_name, and to 1.
        class_images: Folder of images of the class, such as other dogs, so that the base keeps what it knows of it (prior
            preservation); lit-lora prior draws them.
        dry_run: Show the choices and write the config, but do not train.
    """
    from lit_lora.tools.training.request import Request

    sets = (sources, repeats, class_images)
    return Request(folder, base, trigger, captions, out, device, device_memory, cache, max_bad, *sets, dry_run)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The command's own arguments, and the values for keys of the config.

    Raises:
        UserError: If a key has no value, or the command is given whole configs.
    """
    own: list[str] = []
    given: dict[str, Any] = {}
    # A switch needs no value, as in the commands of others.
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    switched = [
        f"{one}=true" if one == "--dry_run" and after.lower() not in ("true", "false") else one for one, after in pairs
    ]
    folders = list(itertools.takewhile(lambda one: not one.startswith("-"), switched))
    if len(folders) > 1:
        own.append(json.dumps(folders))
        switched = switched[len(folders) :]
    for name in _FOR_EACH if folders else ():
        switched = _as_list(switched, name)
    remaining = iter(switched)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        name = _CLASSES.sub(r"\1.init_args.", _LONG.get(name, name))
        if name in ("--config", "-c"):
            raise UserError(
                "--config is no option of train, which makes a config itself: write it with --dry_run, change it, and call "
                "lit-lora fit --config with it; or give single keys, as --trainer.max_steps 500"
            )
        if not name.startswith(_OF_FIT):
            own.append(argument)
            continue
        text = value if equals else next(remaining, None)
        if text is None or name.endswith("+"):
            raise UserError(
                f"{name} needs one value, as --trainer.max_steps 500; lists are not extended here, but replaced"
            )
        given[name.removeprefix("--")] = _value(text)
    return own, given


def _as_list(arguments: list[str], name: str) -> list[str]:
    """The arguments in which several values of an option are one list."""
    if name not in arguments:
        return arguments
    start = arguments.index(name) + 1
    values = list(itertools.takewhile(lambda one: not one.startswith("-"), arguments[start:]))
    listed = [_value(one) if name == "--repeats" else one for one in values]
    return [*arguments[:start], json.dumps(listed), *arguments[start + len(values) :]] if len(values) > 1 else arguments


def _value(text: str) -> Any:
    """A value as YAML has it; a number such as 1e-4 is a number, which PyYAML would take for a text.

    What JSON does not have, such as a date, stays text: the record of the run is JSON, and no option is a date.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
        json.dumps(value)
    except (yaml.YAMLError, ValueError, TypeError):
        return text
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
