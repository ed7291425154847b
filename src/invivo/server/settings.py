"""What an operator can set on the server, with defaults that are safe on one's own machine."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server.

    Attributes:
        host, port: address to bind; anything but loopback needs keys.
        require_keys: ask for a bearer key on loopback too.
        database: SQLAlchemy URL of the key store; None = ``default_database()``.
        served_name: model name that clients use; None = the model's own.
        max_body_bytes: largest JSON body. max_upload_bytes: largest adapter upload.
        max_file_bytes: largest training file. max_stored_bytes: all training files of one key.
        max_blob_bytes: largest upload of tensors.
        max_concurrent: requests in work at once; more are answered 429.
        max_prompt_tokens: longest prompt; None = what the context holds.
        max_output_tokens: used where a request sets no ``max_tokens``, and the most it may set;
            None = until the context is full.
        max_sequences: prompts times ``n`` of one request.
        allowed_origins: web origins, besides the server's own, that may call it from a browser.
        shutdown_seconds: how long running requests may go on after a stop signal.
        runs: folder whose training runs the page shows; None = none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    require_keys: bool = False
    database: str | None = None
    served_name: str | None = None
    max_body_bytes: int = 4 << 20
    max_upload_bytes: int = 512 << 20
    max_file_bytes: int = 512 << 20
    max_stored_bytes: int = 16 << 30
    max_blob_bytes: int = 64 << 20
    max_concurrent: int = 512
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_sequences: int = 128
    allowed_origins: tuple[str, ...] = ()
    shutdown_seconds: float = 5.0
    runs: Path | None = None

    @property
    def keyed(self) -> bool:
        """Whether requests need a bearer key."""
        return self.require_keys or not is_loopback(self.host)

    @property
    def database_url(self) -> str:
        return self.database or default_database()


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or an address) can only be this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def default_database() -> str:
    """URL of the SQLite file in the user's data folder (``INVIVO_HOME`` overrides the folder)."""
    home = os.environ.get("INVIVO_HOME")
    if home:
        folder = Path(home)
    else:
        folder = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "invivo"
    return f"sqlite:///{folder / 'server.sqlite3'}"
