"""invivo: one living language model, and one interface to it.

import invivo

lm = invivo.load("smollm2-135m")            # an engine in this process
lm = invivo.connect("http://127.0.0.1:8000")  # or one behind HTTP: the same calls
print(lm.generate("The capital of France is", max_tokens=8, temperature=0).text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from invivo.lm import LM
    from invivo.local import LocalLM
    from invivo.remote import RemoteLM

__version__ = "0.1.0"
__all__ = ["LM", "LocalLM", "RemoteLM", "__version__", "connect", "load"]

_LAZY = {"LM": "invivo.lm", "LocalLM": "invivo.local", "RemoteLM": "invivo.remote"}


def load(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    state: str | Path | None = None,
    **engine_options: Any,
) -> LocalLM:
    """Load a model into this process and start serving it.

    Args:
        name: a packaged name ("smollm2-135m"), a Hub id, a local folder or a GGUF file.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        dtype: "float32", "bfloat16", ...; None is float32 on a CPU, else the checkpoint's.
        adapters: adapters to load, by name.
        state: folder of the model's fine-tuning jobs; None = one in the user's data folder.
        engine_options: fields of ``invivo.engine.engine.EngineConfig``.
    """
    from invivo.local import LocalLM

    return LocalLM.load(
        name, device=device, dtype=dtype, adapters=adapters, state=state, **engine_options
    )


def connect(url: str, *, key: str | None = None, timeout: float = 600) -> RemoteLM:
    """Use a model that an invivo server serves at ``url``."""
    from invivo.remote import RemoteLM

    return RemoteLM(url, key=key, timeout=timeout)


def __getattr__(name: str) -> Any:
    # The classes are found here too, without importing torch before they are used.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
