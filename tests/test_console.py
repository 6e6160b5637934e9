from __future__ import annotations

import errno
import io
import logging
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lit_lora import cli, console
from lit_lora.errors import UserError
from lit_lora.first_imports import first_imports
from lit_lora.redact import redact_urls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "cannot read https://me:secret@host/a.tar?token=secret; try again",
            "cannot read https://host/a.tar try again",
        ),
        ("['s3://key:secret@bucket/x', 'b']", "['s3://bucket/x', 'b']"),
        ("no URL here: a/b and C:\\\\d", "no URL here: a/b and C:\\\\d"),
    ],
)
def test_urls_lose_their_secrets_in_any_text(text: str, shown: str) -> None:
    assert redact_urls(text).replace(";", "") == shown


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def command(arguments: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.TOOLS, "demo", command)
    return cli.main(["demo"])


def test_a_mistake_is_its_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("cannot read https://me:hunter2@host/a.tar: gone")
    assert fails_with(error, monkeypatch) == 2
    assert capsys.readouterr().err == "lit-lora: error\ncannot read https://host/a.tar: gone\n"


def test_a_port_that_is_taken_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    taken = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError) as error:
        torch.distributed.TCPStore("localhost", taken.port, is_master=True, wait_for_workers=False)
    assert fails_with(error.value, monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        f"lit-lora: error\nport {taken.port} of this machine, at which the processes of the run are to meet"
    )
    assert told.endswith("set MASTER_PORT to another\n")


def test_a_fault_is_a_short_message_and_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert fails_with(RuntimeError("the sky fell at https://me:hunter2@host/x\nand more"), monkeypatch) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("lit-lora: unexpected error\nRuntimeError: the sky fell at https://host/x\n")
    assert "Traceback" not in printed
    (log,) = tmp_path.glob("lit-lora-*.log")
    assert str(log) in printed
    text = log.read_text()
    assert "Traceback" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "hunter2" not in text + printed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("unable to mmap 6898224 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_the_hosts_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails_with(error, monkeypatch) == 1
    assert "the host's memory ran out; lower batch_size" in capsys.readouterr().err


def test_a_limit_of_the_hosts_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3_000_000_000, -1))
    assert "ran out; raise the limit of 3.0 GB (ulimit -v), lower" in str(console.out_of_memory(MemoryError()))


@pytest.mark.parametrize(
    "text",
    [
        "[/__w/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321",
        "Timed out after 1801 seconds waiting for clients. 1/2 clients joined.",
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:301, remote process exited or there was a network error",
    ],
)
def test_another_process_that_gives_no_answer(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.report(RuntimeError(text)) == 1
    printed = capsys.readouterr().err
    assert "another process of this run has ended, or did not answer within the time limit (" in printed
    assert "resume with --ckpt_path last" in printed
    assert "unexpected" not in printed


def test_of_what_gloo_says_the_cause_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    cause = "Read error [127.0.0.1]:3501: Connection reset by peer"
    guesses = ". This is typically caused by a remote worker hanging. Check the logs of the remote worker. GLHF!"
    console.report(RuntimeError(f"[/gloo/transport/tcp/pair.cc:545] {cause}{guesses}"))
    assert f"within the time limit ({cause}).\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "the disk is mounted for reading only: mount it for writing"),
        (errno.EBUSY, "another disk is mounted there: unmount it"),
        (errno.ESTALE, "the network disk has lost the file: mount it again"),
    ],
)
def test_what_cannot_be_written_is_one_message(number: int, todo: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Busy is a folder on which a disk is mounted, and which cannot be replaced by another one."""
    assert console.report(OSError(number, os.strerror(number), "adapter")) == 2
    assert f"cannot write adapter: {os.strerror(number)}; {todo}, or name another" in capsys.readouterr().err


def test_a_permission_that_is_missing_is_not_called_a_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.report(OSError(errno.EACCES, "Permission denied", "images/1.png")) == 2
    assert "error\nPermission denied: images/1.png; change the permissions there, or" in capsys.readouterr().err


def test_what_a_library_finds_wrong_in_the_config_is_a_mistake() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="learning rate") as mistake:
        torch.optim.AdamW([parameter], lr=-1.0)
    assert console.is_config_mistake(mistake.value)
    with pytest.raises(ValueError, match="invalid literal") as fault:
        int("x")
    assert not console.is_config_mistake(fault.value)


def test_a_reader_that_closes_the_pipe() -> None:
    command = f"{sys.executable} -m lit_lora.cli --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("usage: lit-lora")
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_as_wide_as_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    path = f"/a/{'long-path-' * 5}b"
    console.print_error(f"three or four words and {path} and more\n  an indented line of some words\nshort")
    assert shown.getvalue().splitlines() == [
        "lit-lora: error",
        "three or four words and",
        path,
        "and more",
        "  an indented line of some",
        "  words",
        "short",
    ]


def test_lines_in_a_file_stay_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    console.print_error("word " * 50)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_warnings_are_shown_as_errors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: list[str]) -> int:
        with first_imports():
            warnings.formatwarning = lambda *_: "as Lightning shows it"
        return 0

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # is restored
    monkeypatch.setitem(cli.TOOLS, "demo", command)
    assert cli.main(["demo"]) == 0
    message = "read https://me:hunter2@host/a.tar again"
    shown = warnings.formatwarning(message, UserWarning, "module.py", 3)
    assert shown == "lit-lora: warning\nread https://host/a.tar again\n"
    assert "module.py:3: DeprecationWarning: read" in warnings.formatwarning(
        message, DeprecationWarning, "module.py", 3
    )


def test_messages_of_lightning_and_of_the_package_fit_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # is restored
    for name in ("lightning.pytorch", "lit_lora"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    stream = logging.StreamHandler(io.StringIO())
    logging.getLogger("lightning.pytorch").addHandler(stream)
    console.quiet_libraries()
    console.quiet_libraries()
    console.plain_warnings()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logging.getLogger("lightning.pytorch.some.module").warning(
        "-" * 100 + "\n" + "word " * 12 + "\n" + "-" * 100 + "\n"
    )
    logging.getLogger("lit_lora.some.module").warning("word " * 12)
    wrapped = ["word word word word word word"] * 2
    assert [line.strip() for line in stream.stream.getvalue().splitlines()] == wrapped
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == ["lit-lora: warning", *wrapped]


@pytest.mark.parametrize(
    ("logger", "message", "shown"),
    [
        ("utilities.rank_zero", "You are using a CUDA device ('H100') that has Tensor Cores.", False),
        ("accelerators.cuda", "LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: [0]", False),
        ("utilities.rank_zero", "GPU available: True (cuda), used: True", True),
        ("accelerators.cuda", "another message", True),
    ],
)
def test_what_lightning_says_of_each_gpu_is_no_news(
    logger: str, message: str, shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    console.quiet_libraries()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        logging.getLogger(f"lightning.pytorch.{logger}").info(message)
    assert (message in caplog.messages) == shown


def test_memory_of_a_gpu_that_ran_out_is_told_without_torchs_advice() -> None:
    text = "CUDA out of memory. 1.07 MiB is free. If reserved but unallocated memory is large try setting X. See https://a/b#c)"
    told = console.out_of_memory(torch.OutOfMemoryError(text))
    assert told == "CUDA out of memory. 1.07 MiB is free.\nlit-lora plan --config … shows what makes the run fit"
