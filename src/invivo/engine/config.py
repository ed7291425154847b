"""Sizes and switches of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from invivo.engine.host_placement import GB_PER_S
from invivo.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and switches of an engine.

    Attributes:
        max_batch_tokens: token rows of one iteration; None = 2048 on a GPU, 192 on a CPU (an
            iteration of more makes running chats wait, and 192 rows are nearly as efficient).
        max_running: sequences that hold memory at the same time; None = 256 on a GPU, 64 on a CPU.
        block_size: tokens a block of the KV cache.
        kv_bytes: size of the KV cache; None = what ``memory_fraction`` of a GPU leaves, on a CPU
            2 GiB or a quarter of free memory.
        max_model_len: longest prompt + output; None = the model's.
        max_waiting: sequences that may queue before requests are refused.
        prefix_cache: whether prompts with the same beginning share its computation.
        snapshot_bytes: of ``kv_bytes``, what copies of recurrent layers' states may take, from
            which prompts with the same beginning go on; 0 keeps none. None = a quarter of what
            the states of running sequences leave; all of it where no layer keeps keys and values.
        snapshot_tokens: tokens that such a copy must spare a prompt beyond the one before it.
        max_adapters: different adapters at once in the device tables; more may be loaded.
        max_lora_rank: largest rank taken.
        memory_fraction: share of a GPU's memory to use.
        overlap: prepare the next step while one runs; None = on a GPU.
        cuda_graphs: replay decode steps as CUDA graphs; None = on a GPU.
        tpot_ms, ttft_ms: what fine-tuning leaves to requests: milliseconds per output token, and
            to the first one (see :class:`invivo.engine.policies.Slo`). None = 50 ms a token on a
            GPU, 200 on a CPU, where a few requests alone take longer than 50.
        burst: how many ``tpot_ms`` may pass between two tokens of a request that is early. Above 1,
            a few quick iterations gather the slack of one large piece of training, since starting
            one is dear; answers come less evenly, at the same mean pace. 1 keeps every token within
            the promise.
        policy: how fine-tuning shares the device with requests (:mod:`invivo.engine.policies`).
        max_jobs: fine-tuning jobs at once.
        host_bytes: host memory, locked when the engine starts, in which jobs in layer order put
            what their ``tape_bytes`` have no room for; 0 = none.
        host_gb_per_s: what is copied there and back, beside a GPU as fast as an H200: how much is
            worth the way.
        fan_out: whether runs of programs skip layers and tokens that another run has computed, or
            that nobody wants of them.
        max_capture_bytes: bytes that the captures of one request may take, and what its program
            keeps on the device for other runs to read.
    """

    max_batch_tokens: int | None = None
    max_running: int | None = None
    block_size: int = 16
    kv_bytes: int | None = None
    max_model_len: int | None = None
    max_waiting: int = 1024
    prefix_cache: bool = True
    snapshot_bytes: int | None = None
    snapshot_tokens: int = 64
    max_adapters: int = 8
    max_lora_rank: int = 64
    memory_fraction: float = 0.9
    overlap: bool | None = None
    cuda_graphs: bool | None = None
    tpot_ms: float | None = None
    ttft_ms: float = 5000.0
    burst: float = 2.5
    policy: str = "co-serve"
    max_jobs: int = 4
    host_bytes: int = 0
    host_gb_per_s: float = GB_PER_S
    fan_out: bool = True
    max_capture_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name, least in (
            ("block_size", 1),
            ("max_waiting", 0),
            ("host_bytes", 0),
            ("max_adapters", 1),
            ("max_lora_rank", 1),
            ("max_jobs", 1),
            ("max_capture_bytes", 1),
            ("snapshot_tokens", 1),
        ):
            _check_whole(name, getattr(self, name), least)
        for name, least in (
            ("max_batch_tokens", 2),
            ("max_running", 1),
            ("kv_bytes", 1),
            ("max_model_len", 2),
            ("snapshot_bytes", 0),
        ):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), least)
        if not isinstance(self.host_gb_per_s, int | float) or not self.host_gb_per_s > 0:
            raise InvalidRequest(
                "must lie above 0",
                field="host_gb_per_s",
                given=self.host_gb_per_s,
                remedy="Set host_bytes to 0 where nothing is to go there",
            )
        share = self.memory_fraction
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise InvalidRequest(
                "must lie above 0 and be at most 1",
                field="memory_fraction",
                given=share,
            )

    def batch_sizes(self, *, on_gpu: bool) -> tuple[int, int]:
        """(max_running, max_batch_tokens), those left open chosen so that they suit the given."""
        running, rows = (256, 2048) if on_gpu else (64, 192)
        if self.max_running is not None:
            running = self.max_running
            rows = max(rows, 2 * running)
        elif self.max_batch_tokens is not None:
            running = min(running, max(1, self.max_batch_tokens // 2))
        return running, self.max_batch_tokens or rows

    def promised_tpot_ms(self, *, on_gpu: bool) -> float:
        if self.tpot_ms is not None:
            return self.tpot_ms
        return 50.0 if on_gpu else 200.0

    def model_length(self, trained: int) -> int:
        """Longest prompt + output for a model whose positions reach to ``trained``."""
        asked = self.max_model_len
        if asked is None:
            return trained
        if asked > trained:
            raise InvalidRequest(
                f"must lie between 2 and the model's own {trained}",
                field="max_model_len",
                given=asked,
            )
        return asked


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidRequest(f"must be a whole number of at least {least}", field=name, given=value)
