"""The lower floors import on a machine with only torch, numpy, safetensors and transformers."""

from __future__ import annotations

import subprocess
import sys

from tests.waiting import PATIENCE

CHECK = """
import importlib, importlib.abc, pkgutil, sys

ABSENT = {
    "fastapi", "starlette", "uvicorn", "pydantic", "sqlalchemy", "prometheus_client", "multipart",
    "typer", "rich", "gguf", "llguidance", "peft", "accelerate", "openai", "triton",
    "matplotlib", "pyarrow", "scipy",
}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            # Libraries below us may look for these too, and cope.
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
count = 0
for floor in ("kernels", "models", "edits", "sharding", "engine", "training"):
    package = importlib.import_module(f"invivo.{floor}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if ".triton_" not in module.name:
            importlib.import_module(module.name)
            count += 1
for name in ("invivo.errors", "invivo.lm", "invivo.local", "invivo.tools", "invivo.timing"):
    importlib.import_module(name)
print(count)
"""

PLAIN = """
import sys
import invivo.engine.types, invivo.engine.blocks, invivo.engine.scheduler
print("torch" in sys.modules)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_models_and_engine_import_on_a_bare_machine() -> None:
    assert int(run(CHECK)) > 15


def test_policy_imports_without_torch() -> None:
    assert run(PLAIN) == "False"
