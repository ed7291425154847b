"""Idle worker threads of the commands that live long."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOWN = "from invivo.cli.waiting import wait_passively; wait_passively(); import torch"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")]
)
def test_openmp_reads_the_policy_unless_another_is_given(
    given: dict[str, str], policy: str
) -> None:
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    env |= {"OMP_DISPLAY_ENV": "true"} | given
    ran = subprocess.run([sys.executable, "-c", SHOWN], env=env, capture_output=True, check=True)
    assert f"OMP_WAIT_POLICY = '{policy}'" in ran.stderr.decode()
