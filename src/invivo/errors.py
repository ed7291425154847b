"""Typed errors of the whole project.

Every error that a user can cause names the field at fault, what was given and
what to do about it. The server turns them into OpenAI-shaped bodies with
``status``; the command line prints ``str(error)``. ``assert`` is kept for
invariants that only a bug of ours can break.
"""

from __future__ import annotations

from typing import ClassVar


class InvivoError(Exception):
    """Base class: a message, and where it applies the field, the value and the remedy.

    Args:
        message: what is wrong, one sentence without a final stop.
        field: name of the offending parameter (``"sampling.top_p"``), if any.
        given: the value that was given; shortened in the text.
        remedy: what the caller can do.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        given: object = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.field = field
        self.given = given
        self.remedy = remedy
        super().__init__(self._text())

    def _text(self) -> str:
        text = self.message
        if self.field is not None:
            text = f"{self.field}: {text}"
        if self.given is not None:
            shown = repr(self.given)
            text += f" (given {shown if len(shown) <= 120 else shown[:117] + '...'})"
        if self.remedy:
            text += f". {self.remedy}"
        return text


class InvalidRequest(InvivoError):
    """The request cannot be carried out as written (HTTP 400)."""

    status = 400
    kind = "invalid_request_error"


class Unauthorized(InvivoError):
    """No key, or an unknown one (HTTP 401)."""

    status = 401
    kind = "authentication_error"


class Forbidden(InvivoError):
    """The key is known but lacks the scope or the budget (HTTP 403)."""

    status = 403
    kind = "permission_error"


class NotFound(InvivoError):
    """A model, adapter or other named thing does not exist (HTTP 404)."""

    status = 404
    kind = "not_found_error"


class Conflict(InvivoError):
    """The thing exists already or is in use (HTTP 409)."""

    status = 409
    kind = "conflict_error"


class TooLarge(InvivoError):
    """A body, prompt or upload is over its limit (HTTP 413)."""

    status = 413
    kind = "invalid_request_error"


class Overloaded(InvivoError):
    """The queue is full; try again later (HTTP 429)."""

    status = 429
    kind = "rate_limit_error"


class Unavailable(InvivoError):
    """The engine is starting, draining or has failed (HTTP 503)."""

    status = 503
    kind = "unavailable_error"


class UnsupportedModel(InvivoError):
    """A checkpoint whose architecture, tensors or file format cannot be read."""

    status = 400
    kind = "invalid_request_error"


class MissingDependency(InvivoError):
    """An optional library is needed; the remedy names the extra to install."""

    status = 501
    kind = "missing_dependency_error"


class Diverged(InvivoError):
    """Training gave a loss or gradient that is not a number; no such step is ever kept."""

    status = 500
    kind = "training_error"


class StorageRefused(InvivoError):
    """The disk is full or refuses to write (HTTP 507)."""

    status = 507
    kind = "storage_error"
