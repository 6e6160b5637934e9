"""Names of options that do not exist, and the options that were probably meant."""

from __future__ import annotations

import re
from argparse import Action
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

SHORT = {
    "steps": "trainer.max_steps",
    "time": "trainer.max_time",
    "rank": "model.adapter.init_args.r",
    "lr": "model.optimizer.init_args.lr",
    "resolution": "data.init_args.resolution",
    "batch_size": "data.init_args.batch_size",
}
"""Options of ``lit-lora fit`` by the names that ``lit-lora train`` gives them."""

_OTHER_NAMES = {
    **{name: (path,) for name, path in SHORT.items()},
    "alpha": ("model.adapter.init_args.lora_alpha",),
    "base": ("model.family.init_args.pretrained_model_name_or_path",),
    "data_dir": ("data.init_args.train_shards",),
    "epochs": ("trainer.max_epochs",),
    "gradient_accumulation_steps": ("trainer.accumulate_grad_batches",),
    "gradient_checkpointing": ("model.memory.gradient_checkpointing",),
    "learning_rate": ("lr", "model.optimizer.init_args.lr"),
    "max_grad_norm": ("trainer.gradient_clip_val",),
    "max_steps": ("steps",),
    "max_train_epochs": ("trainer.max_epochs",),
    "max_train_steps": ("steps", "trainer.max_steps"),
    "mixed_precision": ("model.base_dtype",),
    "network_alpha": ("model.adapter.init_args.lora_alpha",),
    "network_dim": ("rank", "model.adapter.init_args.r"),
    "num_epochs": ("trainer.max_epochs",),
    "num_train_epochs": ("trainer.max_epochs",),
    "num_workers": ("data.init_args.num_workers",),
    "output_dir": ("out", "trainer.default_root_dir"),
    "pretrained_model_name_or_path": ("base", "model.family.init_args.pretrained_model_name_or_path"),
    "resume": ("ckpt_path",),
    "resume_from_checkpoint": ("ckpt_path",),
    "train_batch_size": ("batch_size", "data.init_args.batch_size"),
    "train_data_dir": ("data.init_args.train_shards",),
    "train_shards": ("data.init_args.train_shards",),
    "train_steps": ("steps", "trainer.max_steps"),
    "val_shards": ("data.init_args.val_shards",),
}
"""Options by the names that they have in scripts of diffusers and kohya, or in another of our commands."""

_PLURAL = re.compile(r"ambiguous option: (\S+) could match (\S+), \2\+$")
"""What jsonargparse says of the beginning of an option for a list, which it has twice."""


def in_full(message: str) -> str | None:
    """What to say of an option that was not written in full; None if an error message is about something else."""
    found = _PLURAL.match(message)
    return f"there is no option {found[1]}; did you mean {found[2]}?" if found else None


def option_names(actions: Iterable[Action]) -> set[str]:
    """Names of a parser's options, those of its subcommands included."""
    names = set()
    for action in actions:
        if not action.dest.endswith("help"):
            names.add(action.dest)
        for parser in action.choices.values() if isinstance(action.choices, dict) else ():
            names |= option_names(parser._actions)
    return names


def no_option(path: str, options: Iterable[str], otherwise: str, dashes: str = "", owner: str = "") -> str:
    """A sentence about an option that does not exist.

    Args:
        path: See :func:`advice_for`.
        options: See :func:`advice_for`.
        otherwise: Advice if no option is like it.
        dashes: See :func:`advice_for`.
        owner: Class that has the options; defaults to "", the command itself.
    """
    of = f" of {owner}" if owner else ""
    return f"there is no option {dashes}{path}{of}; {advice_for(path, options, dashes) or otherwise}"


def advice_for(path: str, options: Iterable[str], dashes: str = "") -> str | None:
    """What to write in place of an option that does not exist; None if no other is like it.

    Args:
        path: Name of the option with the parts that it is in, such as ``trainer.max_stepz``.
        options: The options that exist, written in the same way.
        dashes: What the command line has before a name, ``--``; defaults to "", as in a config file.
    """
    near = _nearest(path, sorted(options))
    return f"did you mean {dashes}{near}?" if near else None


def _nearest(path: str, options: Sequence[str]) -> str | None:
    """What other trainers call by this name, an option beside it with nearly the same one, or one elsewhere with the same."""
    part, dot, name = path.rpartition(".")
    parts = {option.partition(".")[0] for option in options}
    for other in _OTHER_NAMES.get(name, ()):
        if other in options or ("." in other and other.partition(".")[0] in parts and not part):
            return other
    beside = [option.rpartition(".")[2] for option in options if option.rpartition(".")[0] == part]
    if close := get_close_matches(name, beside, n=1, cutoff=0.7):
        return f"{part}{dot}{close[0]}"
    return next((option for option in options if option.rpartition(".")[2] == name), None)
