"""Many clients at once: every valid answer is right, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time

import httpx
import pytest
from tests.tiny import tiny_model_folder
from tests.waiting import PATIENCE, held_after

import invivo
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

N_REQUESTS = 200
CANCELLED = 20
MALFORMED = 10
LONGEST = 40
WORDS = ["the", "and", "you", "not", "is", "of", "cat", "dog", "red", "blue", "hello", "world"]
BROKEN = [
    (b'{"messages": ', 400),
    (b'{"messages": [{"role": "user"}]}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "warm"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "other"}', 404),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -3}', 400),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """A cache that holds a fraction of the load, so that sequences wait and are preempted."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("small"), max_position_embeddings=1024)
    with invivo.load(
        str(folder),
        device="cpu",
        dtype="float32",
        kv_bytes=1 << 20,
        max_batch_tokens=256,
        max_running=64,
    ) as made:
        yield made


def conversation(rng: random.Random) -> list[dict[str, str]]:
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    return [{"role": "user", "content": text}]


async def one_stream(client, body: dict, leave_after: int | None) -> list[int] | None:
    """Token ids of a streamed answer, None when the client left in its middle."""
    ids: list[int] = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        seen = 0
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return ids
            if line.startswith("data: "):
                (choice,) = json.loads(line[6:])["choices"]
                ids += choice["token_ids"]
                seen += 1
                if leave_after is not None and seen > leave_after:
                    return None
    raise AssertionError("the stream ended without its last event")


async def one_broken(client, content: bytes, status: int) -> None:
    response = await client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    assert response.json()["error"]["remedy"]


def test_two_hundred_streams_with_leavers_and_nonsense(small, caplog):
    rng = random.Random(0)
    greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": True}
    conversations = [conversation(rng) for _ in range(40)]
    alone = [
        small.chat(one, temperature=0, ignore_eos=True, max_tokens=LONGEST).choices[0].tokens
        for one in conversations
    ]

    async def run(url: str) -> tuple[int, int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE) as client:
            work, expected = [], []
            for i in range(N_REQUESTS):
                if i < MALFORMED:
                    work.append(one_broken(client, *BROKEN[i % len(BROKEN)]))
                    expected.append(None)
                    continue
                which, length = rng.randrange(len(conversations)), rng.randint(4, LONGEST)
                body = greedy | {"messages": conversations[which], "max_tokens": length}
                leaves = i < MALFORMED + CANCELLED
                work.append(one_stream(client, body, rng.randint(0, 2) if leaves else None))
                expected.append(None if leaves else alone[which][:length])
            order = list(range(N_REQUESTS))
            rng.shuffle(order)
            answers = await asyncio.gather(*(work[i] for i in order))
        right = sum(answers[at] == expected[i] for at, i in enumerate(order))
        valid = sum(one is not None for one in expected)
        return right, valid

    with caplog.at_level(logging.INFO), ServerThread(small, Settings(port=0)) as server:
        inbox, crowded = small.engine._inbox, threading.Event()

        def many_have_come() -> bool:
            if len(inbox.live) >= 60:  # then they do not all fit, and some are preempted
                crowded.set()
            return crowded.is_set()

        with held_after(small.engine, 0, until=many_have_come):
            right, valid = asyncio.run(run(server.url))
        assert valid == N_REQUESTS - CANCELLED - MALFORMED
        assert right == N_REQUESTS
        deadline = time.monotonic() + PATIENCE
        while True:
            stats = small.stats()
            left = (stats["running"], stats["waiting"], stats["kv"]["used"])
            if left == (0, 0, 0) and server.app.state.services.gate.taken == 0:
                break
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
    assert stats["totals"]["error"] == 0
    assert stats["preemptions"] > 0
    assert [one for one in caplog.records if one.levelno >= logging.ERROR] == []
