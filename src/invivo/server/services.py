"""What the routes share: one object on the application, no globals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastapi import Request

from invivo.errors import NotFound
from invivo.lm import LM, ModelInfo
from invivo.lm_jobs import is_checkpoint
from invivo.server.admission import Gate
from invivo.server.budgets import Ledger
from invivo.server.keys import KeyStore
from invivo.server.settings import Settings

if TYPE_CHECKING:
    from invivo.jobs.service import JobService
    from invivo.local import LocalLM


@dataclass(slots=True)
class Services:
    """The model, the settings and the bookkeeping of one application.

    Attributes:
        keys: None on an open loopback server.
        uploads: folder for uploaded adapters, for as long as the application lives.
        draining: set when the server stops; it is then no longer ready.
    """

    lm: LM
    info: ModelInfo
    settings: Settings
    gate: Gate
    keys: KeyStore | None
    ledger: Ledger | None
    uploads: Path
    draining: bool = False

    @property
    def model_name(self) -> str:
        if self.settings.served_name is not None:
            return self.settings.served_name
        name = self.info.name
        # A model from a folder goes by the folder's name: clients need not learn the path.
        return Path(name).name if name.startswith(("/", ".", "~")) else name

    @property
    def local(self) -> LocalLM:
        """The model as one of this process: what marks prompts and keeps programs."""
        return cast("LocalLM", self.lm)

    @property
    def jobs(self) -> JobService:
        """Files and jobs of the model; their folder is opened at the first use.

        Raises:
            Conflict: another process has it in hand.
            InvalidRequest: the model cannot be fine-tuned.
        """
        return cast("JobService", self.lm.fine_tuning)

    def _is_checkpoint(self, name: str, owner: str | None) -> bool:
        return is_checkpoint(name) and self.jobs.checkpoint_folder_of(name, owner) is not None

    def adapter_of(self, model: str | None, owner: str | None) -> str | None:
        """The adapter that a request's ``model`` ("base" or "base:adapter") asks for.

        Args:
            owner: who asks, as :func:`invivo.server.ownership.seen_by` says. A checkpoint
                ("base:adapter:ckpt-step-N") is first asked for by the owner of its job; from then
                on it is served like any adapter.

        Raises:
            NotFound: another model, or an adapter that is not loaded.
        """
        base = self.model_name
        if model is None or model == base:
            return None
        name = model.removeprefix(f"{base}:")
        if name == model:
            raise NotFound(
                "this model is not served here",
                field="model",
                given=model,
                remedy=f"Use {base!r}, or see /v1/models",
            )
        loaded = [adapter.name for adapter in self.lm.adapters()]
        if name not in loaded and not self._is_checkpoint(name, owner):
            raise NotFound(
                "no such adapter is loaded",
                field="model",
                given=model,
                remedy=f"Loaded adapters: {', '.join(loaded) or 'none'}; "
                "POST /v1/adapters loads one",
            )
        return name


def services_of(request: Request) -> Services:
    """The services of the application that serves ``request``."""
    return cast(Services, request.app.state.services)
