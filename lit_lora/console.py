"""Errors on the console: one message each, without secrets."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import textwrap
import threading
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lit_lora.byte_sizes import format_bytes
from lit_lora.errors import UserError
from lit_lora.files import remedy
from lit_lora.redact import redact_urls
from lit_lora.told_once import tell_once_on_node
from lit_lora.visible import visible_lines

_CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EBUSY,
    errno.ESTALE,
)

_VERSIONS = ("lit_lora", "torch", "lightning", "diffusers", "peft", "transformers")

_CONFIG_CHECKS = re.compile(r"[/\\](lightning[/\\](pytorch|fabric)|torch[/\\]optim|jsonargparse)[/\\]")
"""Libraries that check the user's config while a run starts; their own ``ValueError`` and the like are about it."""

_NO_ANSWER = re.compile(
    r"[/\\](gloo|c10d|distributed)[/\\].*(Timed out|Connection (closed|reset)|Broken pipe)"
    r"|NCCL.*(timeout|remote process)|Timed out after .* waiting for clients",
    re.IGNORECASE | re.DOTALL,
)
"""Errors of torch, gloo and NCCL when another process is gone or silent, or does not come at the start."""

_ADVICE_OF_GLOO = re.compile(r"^\[/[^\]]*\] |\.? This is typically caused by .*|\.$")
"""The place in gloo's code, and its guesses about the reason."""

_NO_MEMORY = re.compile(
    "DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc|failed to map segment"
)
"""What torch and the system say when the host's memory runs out."""

_pythons_format = warnings.formatwarning

_NOISY_LOGGERS = (
    "torch.utils._pytree",
    "bitsandbytes",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "diffusers.loaders.lora_base",
)
"""Loggers that warn about each other's libraries, or that an adapter leaves the text encoder alone."""

_NO_NEWS = (
    "\N{ELECTRIC LIGHT BULB}",
    "TPU available",
    "You are using a CUDA device",
    "LOCAL_RANK:",
    "`Trainer(val_check_interval=1)`",
    "`Trainer.fit` stopped: `max_steps=",
    "Restoring states from the checkpoint path",
)
"""Beginnings of Lightning's messages that advertise, or tell what config, bar and other messages say."""

_SEED_LOGGER = "lightning.fabric.utilities.seed"
"""Tells the seed, which is in the config, also where nothing is drawn."""


def quiet_libraries() -> None:
    """Hide messages of libraries that tell a user nothing; call it before they are imported. Their errors are still shown."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(_SEED_LOGGER).setLevel(logging.WARNING)
    for name in ("utilities.rank_zero", "accelerators.cuda"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_news)
    own = logging.getLogger("lit_lora")
    if not any(isinstance(one, _OwnMessages) for one in own.handlers):
        own.addHandler(_OwnMessages())
    threading.excepthook = _print_unless_told


class _OwnMessages(logging.Handler):
    """Shows the package's own log messages as errors are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage(), record.levelname.lower())


def _print_unless_told(arguments: threading.ExceptHookArgs) -> None:
    """The traceback of a thread, unless it is TensorBoard's writer, whose error the next call of its logger raises."""
    if arguments.thread is None or not hasattr(arguments.thread, "_record_writer"):
        threading.__excepthook__(arguments)


def print_error(message: str, title: str = "error") -> None:
    """Print a mistake of the user's to stderr."""
    print(_titled(message, title), file=sys.stderr, flush=True)


def print_mistake(message: str, title: str = "error") -> None:
    """Print a mistake of the user's that ends this process, once for all processes of a node that torchrun started."""
    tell_once_on_node(message, lambda: print_error(message, title))


def plain_warnings() -> None:
    """Show warnings as errors are shown, without the line of code that gave them, and Lightning's messages in lines that fit.

    Call it after the libraries are imported.
    """
    warnings.formatwarning = _format_warning
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.setFormatter(_FittingLines())


class _FittingLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).strip("\n").split("\n")
        return "\n".join(_fitting([line for line in lines if line.strip("-") or not line]))


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, UserWarning):
        return _titled(str(message), "warning") + "\n"
    return _pythons_format(message, category, filename, lineno, line)


def _titled(message: str, title: str) -> str:
    """A message under its title."""
    return "\n".join([f"lit-lora: {title}", *_fitting(visible_lines(redact_urls(message)).split("\n"))])


def _fitting(lines: list[str]) -> list[str]:
    """Lines as wide as the terminal; in a file they are left whole."""
    if not sys.stderr.isatty():
        return lines
    width = shutil.get_terminal_size().columns
    return [_wrapped(line, width) if len(line) > width else line for line in lines]


def _wrapped(line: str, width: int) -> str:
    """A line divided between words; paths stay whole, and an indented line stays indented."""
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def print_fault(error: BaseException) -> None:
    """Print a short message about an error that nobody expected; the traceback and the versions go to a file that it names."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="lit-lora-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write("".join(f"{name} {_version(name)}\n" for name in _VERSIONS))
        file.write(f"Python {platform.python_version()}, {platform.platform()}\n")
        file.write(f"{redact_urls(' '.join(sys.argv))}\n\n")
        file.write(redact_urls("".join(traceback.format_exception(error))))
    lines = str(error).strip().splitlines() or [""]
    print_error(
        f"{type(error).__name__}: {lines[0]}\nThis is not a mistake that lit-lora expects. The traceback and all versions are in "
        f"{file.name}; please report it with that file",
        "unexpected error",
    )


def report(error: Exception) -> int:
    """Print an error that has ended a command, and return the exit status: 2 for a mistake of the user's, otherwise 1."""
    if isinstance(error, BrokenPipeError):
        return end_quietly()
    taken = port_taken(error)
    if taken or isinstance(error, UserError) or is_config_mistake(error):
        if not _is_told(error):
            print_mistake(taken or str(error))
        return 2
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        where = error.filename or ("the logs of TensorBoard" if _raised_in(error, "tensorboard") else "a file")
        denied = isinstance(error, PermissionError)  # perhaps to read
        told = f"{error.strerror}: {where}" if denied else f"cannot write {where}: {error.strerror}"
        print_mistake(f"{told}; {remedy(error)}, or name another folder. What is complete is kept")
        return 2
    if message := out_of_memory(error) or other_process_lost(error):
        if not _is_told(error):
            print_error(message)
    else:
        print_fault(error)
    return 1


def mark_told(error: BaseException) -> None:
    """Note that a mistake of the user's is on the screen already, perhaps of another process, so that no one prints it again."""
    error.lit_lora_told = True  # type: ignore[attr-defined]


def _is_told(error: BaseException) -> bool:
    return any(hasattr(one, "lit_lora_told") for one in (error, error.__cause__))


def _raised_in(error: BaseException, library: str) -> bool:
    return any(library in Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__))


def is_config_mistake(error: BaseException) -> bool:
    """Whether a library found a value of the config wrong, as ``Trainer`` and learning rate schedules do."""
    if not isinstance(error, ValueError | TypeError | KeyError | NotImplementedError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _CONFIG_CHECKS.search(frames[-1].filename) is not None


def out_of_memory(error: BaseException) -> str | None:
    """A sentence about an error that means that memory of the host or of the GPU ran out; None for other errors."""
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError | ImportError) and _NO_MEMORY.search(text)
    ):
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        limited = "" if limit == resource.RLIM_INFINITY else f"raise the limit of {format_bytes(limit)} (ulimit -v), "
        return f"the host's memory ran out; {limited}lower batch_size or num_workers, or quantize the base"
    if type(error).__name__ == "OutOfMemoryError":
        return f"{gpu_memory(error)}\nlit-lora plan --config … shows what makes the run fit"
    return None


def gpu_memory(error: BaseException) -> str:
    """What torch says of a GPU whose memory ran out, without its advice about fragments, which help a run seldom."""
    return str(error).splitlines()[0].partition(" If reserved but unallocated")[0]


def port_taken(error: BaseException) -> str | None:
    """A sentence about an error that means that the port at which processes meet is taken; None for other errors."""
    found = re.search(r"port: (\d+).*EADDRINUSE", str(error)) if isinstance(error, RuntimeError) else None
    return found and (
        f"port {found[1]} of this machine, at which the processes of the run are to meet, is taken, perhaps by another run; set "
        "MASTER_PORT to another"
    )


def other_process_lost(error: BaseException) -> str | None:
    """A sentence about an error that means that another process of the run gave no answer; None for other errors."""
    if not isinstance(error, RuntimeError) or not _NO_ANSWER.search(str(error)):
        return None
    found = _ADVICE_OF_GLOO.sub("", str(error).splitlines()[0])[-120:]
    return (
        f"another process of this run has ended, or did not answer within the time limit ({found})."
        "\nIts own output tells why. If it was only slow or stopped, raise the timeout of the strategy, as in trainer.strategy:"
        ' {class_path: DDPStrategy, init_args: {timeout: "1:00:00"}}; then resume with --ckpt_path last'
    )


def end_quietly() -> int:
    """After the reader of stdout has closed it, as ``head`` does: write nothing more, and return the exit status of SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's tells something new; it is added once."""
    return not record.getMessage().startswith(_NO_NEWS)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"
