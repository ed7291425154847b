"""Named tensors handed in beside a program: checked, hashed, and within a byte budget."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from invivo.errors import InvalidRequest, TooLarge

DEFAULT_BUDGET = 64 * 2**20
_MAX_COUNT = 1024


class Blobs:
    """Tensors by name; each is also found under the hash of its content ("sha256:...").

    Args:
        tensors: floating point or integer tensors; floating point ones are finite.
        budget: most bytes of all together.

    Raises:
        InvalidRequest: a tensor is not finite, complex or empty.
        TooLarge: the budget does not allow for them.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor] | None = None, *, budget: int = DEFAULT_BUDGET
    ) -> None:
        self.budget = budget
        self.n_bytes = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._hashes: dict[str, str] = {}
        for name, tensor in (tensors or {}).items():
            self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Check and keep ``tensor``; returns the hash of its content."""
        field = f"blobs.{name}"
        size = tensor.numel() * tensor.element_size()
        if self.n_bytes + size > self.budget or len(self._hashes) >= _MAX_COUNT:
            raise TooLarge(
                f"at most {self.budget} bytes and {_MAX_COUNT} tensors",
                field=field,
                given=f"{self.n_bytes + size} bytes",
            )
        if tensor.numel() == 0 or tensor.is_complex() or tensor.dim() > 4:
            raise InvalidRequest(
                "a real tensor of 1 to 4 dimensions is needed", field=field, given=tensor.shape
            )
        tensor = tensor.detach().cpu().contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidRequest("the tensor has NaN or infinite numbers", field=field)
        digest = content_hash(tensor)
        self.n_bytes += size
        self._tensors[name] = self._tensors[digest] = tensor
        self._hashes[name] = self._hashes[digest] = digest
        return digest

    def get(self, name: str, field: str) -> torch.Tensor:
        """The tensor of this name or hash.

        Raises:
            InvalidRequest: there is none.
        """
        if name not in self._tensors:
            known = sorted(n for n in self._tensors if not n.startswith("sha256:"))
            raise InvalidRequest(
                "there is no tensor of this name",
                field=field,
                given=f"blob:{name}",
                remedy=f"Handed in: {', '.join(known) or 'none'}",
            )
        return self._tensors[name]

    def hash_of(self, name: str) -> str:
        """The content hash of the tensor of this name, which is here."""
        return self._hashes[name]

    def names(self) -> list[str]:
        """Under which tensors were handed in, in order."""
        return sorted(name for name, digest in self._hashes.items() if name != digest)

    def digest(self) -> tuple[tuple[str, str], ...]:
        """Names and content hashes of all tensors."""
        return tuple(sorted(self._hashes.items()))

    def hashes(self, names: Iterable[str]) -> tuple[str, ...]:
        """Content hashes of those of ``names`` that are here: what a cache needs to know."""
        return tuple(f"{name}={self._hashes[name]}" for name in names if name in self._hashes)


def content_hash(tensor: torch.Tensor) -> str:
    """ "sha256:..." over dtype, shape and bytes; the same tensor gives the same hash anywhere."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
