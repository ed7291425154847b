"""One of the processes that torchrun starts for a test: a run that stops before some step.

Usage: parallel_worker.py CONFIG RUNS [STEP]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

from invivo.training.config import read_config
from invivo.training.run import train

torch.set_num_threads(1)
config, runs = read_config(sys.argv[1]), Path(sys.argv[2])
step = int(sys.argv[3]) if len(sys.argv) > 3 else None
asked = itertools.count()
train(config, runs=runs, stop=lambda: next(asked) == step)
