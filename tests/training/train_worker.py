"""A training process that a test kills: it stands still in a checkpoint, so the moment is known.

Usage: train_worker.py CONFIG RUNS STEP
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from invivo.training import checkpoint
from invivo.training.config import read_config
from invivo.training.run import train

config, runs, step = read_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])


def flush(path: Path) -> None:
    if f"{step:08d}" in str(path):
        threading.Event().wait()  # the files are there, the checkpoint has not got its name


checkpoint._flush = flush
train(config, runs=runs)
