"""A few processes that train together, forked from one that has already imported everything.

torch takes seconds to import: one child of a test forks them all, as often as it needs some.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import torch
from torch.distributed import TCPStore


def together(n: int, body: Callable[[], None]) -> None:
    """Run ``body`` in ``n`` processes that find each other as torchrun's do.

    Raises:
        SystemExit: one of them failed; it has said why, and the others are ended.
    """
    torch.set_num_threads(1)
    sys.stdout.flush()
    gates, pids = [], []
    for rank in range(n):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            for end in (writer, *gates):
                os.close(end)
            _one_of(n, rank, reader, body)
        os.close(reader)
        gates.append(writer)
        pids.append(pid)
    # The processes exist before this one has the store's threads.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for gate in gates:
        os.write(gate, f"{store.port}\n".encode())
        os.close(gate)
    left = set(pids)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            for other in left:
                os.kill(other, 9)
            raise SystemExit(f"process {pids.index(pid)} failed")


def _one_of(n: int, rank: int, gate: int, body: Callable[[], None]) -> None:
    status = 1
    try:
        port = os.read(gate, 16).decode().strip()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
