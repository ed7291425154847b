"""One of the processes that torchrun starts for a test: a run that stops before some step.

Usage: parallel_worker.py CONFIG RUNS DEVICE [STOP [FULL]]; at step FULL the disk of the second
process is full.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from invivo.training.config import read_config
from invivo.training.run import train

torch.set_num_threads(1)
config, runs = read_config(sys.argv[1]), Path(sys.argv[2])
stop, full = (int(sys.argv[i]) if len(sys.argv) > i else None for i in (4, 5))
write_data = HuggingFaceStorageWriter.write_data


def say_whose_threads_are_left() -> None:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if left := [name for name in names if "gloo" in name]:
        print("threads that outlive their group:", *left, file=sys.stderr, flush=True)
        os._exit(3)


def on_a_full_disk(self: HuggingFaceStorageWriter, *plan: Any) -> Any:
    if os.environ["RANK"] == "1" and f"{full:08d}" in str(self.path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write_data(self, *plan)


atexit.register(say_whose_threads_are_left)  # the first to register is the last to be called
if full is not None:
    HuggingFaceStorageWriter.write_data = on_a_full_disk  # type: ignore[method-assign]
asked = itertools.count()
train(config, runs=runs, device=sys.argv[3], stop=lambda: next(asked) == stop)
