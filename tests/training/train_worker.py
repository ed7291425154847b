"""A training process that a test kills: it stands still at an event, so that the moment is known.

Usage: train_worker.py CONFIG RUNS (step:N | checkpoint:N)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invivo.training import checkpoint
from invivo.training.config import read_config
from invivo.training.run import train

config, runs, where = read_config(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
place, number = where.split(":")


def told(line: Mapping[str, Any]) -> None:
    if place == "step" and line["kind"] == "step" and line["step"] == int(number):
        threading.Event().wait()


def flush(path: Path) -> None:
    if place == "checkpoint" and f"{int(number):08d}" in str(path):
        threading.Event().wait()  # the files are there, the checkpoint has not got its name


checkpoint._flush = flush
train(config, runs=runs, told=told)
