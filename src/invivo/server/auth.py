"""Who asks, and whether they may: bearer keys with scopes, or this machine's own user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from invivo.errors import Forbidden, InvalidRequest, Unauthorized
from invivo.server.keys import SCOPES, KeyStore
from invivo.server.services import Services, services_of
from invivo.server.settings import Settings, is_loopback

_bearer = HTTPBearer(auto_error=False, description="A key made by `invivo keys add`")


@dataclass(frozen=True, slots=True)
class Principal:
    """The one who asks.

    Attributes:
        key_id: id of the key, None = this machine's user on an open loopback server.
        budget: tokens the key may spend in all, None = unlimited.
    """

    key_id: str | None
    name: str
    scopes: frozenset[str]
    budget: int | None = None

    def salt(self, wanted: str | None) -> str:
        """Keeps the cached prefixes of one key (and one wish of its holder) apart from others'."""
        if self.key_id is None:
            return wanted or ""
        return f"{self.key_id}/{wanted or ''}"

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


LOCAL = Principal(key_id=None, name="local", scopes=frozenset(SCOPES))


def needs(*scopes: str) -> Callable[..., Principal]:
    """A dependency: the principal, who has one of ``scopes`` (none given: any known key).

    Raises (when the dependency runs):
        Unauthorized: no key or an unknown one; on an open server, a caller from elsewhere.
        Forbidden: the key lacks the scopes, or a web page of another origin calls.
    """

    def principal(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Principal:
        services = services_of(request)
        _check_origin(request, services.settings)
        if services.keys is None:
            _check_local(request)
            return LOCAL
        found = _with_key(services, services.keys, credentials)
        if scopes and not any(found.may(scope) for scope in scopes):
            raise Forbidden(
                f"this key lacks the scope {' or '.join(scopes)}",
                field="Authorization",
                remedy=f"Use a key with it, made by `invivo keys add NAME --scope {scopes[0]}`",
            )
        return found

    return principal


def check_exposure(settings: Settings, keys: KeyStore | None) -> None:
    """Refuses to serve where anyone could ask anything.

    Raises:
        InvalidRequest: keys are needed (another address than loopback, or ``require_keys``) and
            there is none.
    """
    if keys is not None and not keys.any_active():
        raise InvalidRequest(
            "keys are needed to serve on this address, and there is none"
            if not is_loopback(settings.host)
            else "keys are required, and there is none",
            field="host" if not is_loopback(settings.host) else "require_keys",
            given=settings.host,
            remedy="Make one with `invivo keys add NAME`, or bind to 127.0.0.1",
        )


def _with_key(
    services: Services, keys: KeyStore, credentials: HTTPAuthorizationCredentials | None
) -> Principal:
    if credentials is None:
        raise Unauthorized(
            "a key is needed",
            field="Authorization",
            remedy="Send the header Authorization: Bearer <key>; `invivo keys add` makes one",
        )
    key = keys.find(credentials.credentials)
    if key is None:
        raise Unauthorized(
            "this key is unknown or was revoked",
            field="Authorization",
            remedy="See `invivo keys list` on the server",
        )
    return Principal(key.id, key.name, key.scopes, key.budget)


def _check_origin(request: Request, settings: Settings) -> None:
    """Web pages of other origins may not use the server through the visitor's browser."""
    origin = request.headers.get("origin")
    if origin is None or origin in settings.allowed_origins:
        return
    try:
        place = urlsplit(origin).netloc
    except ValueError:  # not an origin that a browser sends
        place = None
    if place is None or place != request.headers.get("host"):
        raise Forbidden(
            "calls from this web origin are not allowed",
            field="Origin",
            given=origin,
            remedy="Start the server with this origin among the allowed ones",
        )


def _check_local(request: Request) -> None:
    """Without keys only this machine is served, and only under a name of its own.

    The name is checked because a foreign host name that resolves to loopback (DNS rebinding)
    makes a foreign web page look like one of ours.
    """
    client = request.client
    if client is not None and not is_loopback(client.host):
        raise Unauthorized(
            "this server has no keys and answers this machine only",
            field="Authorization",
            remedy="Start it with keys required",
        )
    try:
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        name = "?"
    if name and not is_loopback(name):
        raise Forbidden(
            "this server without keys answers to loopback names only",
            field="Host",
            given=name,
            remedy="Use http://127.0.0.1, or start the server with keys required",
        )
