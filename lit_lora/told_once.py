"""Messages that several processes of a node have alike, and that one of them prints."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# torch is imported late: a mistake in a config is told before it is needed.

SECONDS_TO_ASK, SECONDS_OF_FIRST = 5, 1
"""How long a process waits for another that may have told the same mistake; how long the others of a node wait for the first,
whose output may be the only one that is shown."""


def tell_once(store: Store, key: str, tell: Callable[[], None], is_first: bool) -> bool:
    """Print a message for all processes, or wait until another one has done so.

    Args:
        store: Store of the processes.
        key: Key of the message, the same in all processes that are to print it once.
        tell: Prints the message.
        is_first: Whether this is the first process of the node.

    Returns:
        Whether the message is printed; False if the other process ended before it printed, or the store is gone.
    """
    from torch.distributed import DistStoreError

    try:
        if not is_first:
            with suppress(DistStoreError):  # the first has not found this
                store.wait([f"{key} begun"], timedelta(seconds=SECONDS_OF_FIRST))
        if store.add(f"{key} begun", 1) == 1:
            tell()
            with suppress(RuntimeError):  # the others tell it themselves
                store.set(f"{key} done", "")
        else:
            store.wait([f"{key} done"], timedelta(seconds=SECONDS_TO_ASK))
    except RuntimeError:
        return False
    return True


def tell_once_on_node(message: str, tell: Callable[[], None]) -> None:
    """Print a mistake that ends this process; of the processes that torchrun started, one of each node does it for those that
    find the same mistake.

    They may not be joined yet, so they ask the store of torchrun itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        tell()
        return
    if threading.current_thread() is threading.main_thread():
        # torchrun stops all processes when the first one ends, and this one is to end with its own exit status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        address, port, node, rank, restart = (
            os.environ[name]
            for name in ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
        )
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=SECONDS_TO_ASK))
        key = f"lit_lora of node {node}, restart {restart}: {message}"
        is_told = tell_once(store, key, tell, rank == "0")
    except (KeyError, ValueError, RuntimeError):  # another launcher's environment, or the store is gone
        is_told = False
    if not is_told:
        tell()
