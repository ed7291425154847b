"""Triton's interpreter, a third faster: its language is prepared once a launch.

The interpreter replaces every function of Triton's language at each call of a device function,
though the launch around it has done so already; thousands of calls spend a third of their time
on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime import interpreter


def prepare_once_a_launch(patch: pytest.MonkeyPatch) -> None:
    """Calls inside a launch find the language as the launch, or the first such call, left it.

    Does nothing to a Triton whose interpreter prepares in another way.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare: Callable[[Any], Any] = interpreter._patch_lang
    prepared: set[int] = set()  # modules of the language
    launches: list[Any] = []

    def once(function: Any) -> Any:
        languages = {
            id(value)
            for value in function.__globals__.values()
            if value is interpreter.tl or value is interpreter.tl.core
        }
        if launches and languages <= prepared:
            return interpreter._LangPatchScope()
        scope = prepare(function)
        prepared.update(languages)
        if not launches:
            launches.append(scope)
            restore = scope.restore

            def ended() -> None:
                launches.clear()
                prepared.clear()
                restore()

            scope.restore = ended
        return scope

    patch.setattr(interpreter, "_patch_lang", once)
