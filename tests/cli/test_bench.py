"""``invivo bench``: levels, counts and cuts; the figures themselves are the machine's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invivo.cli.bench import cuts

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

SMALL = ("--concurrency", "1,3", "--prompt-tokens", "20", "--max-tokens", "5")


def test_every_level_is_measured_to_its_full_length(invivo: Invivo, tiny: str) -> None:
    got = invivo("bench", *SMALL, "-m", tiny, "--json").json()
    assert [level["concurrency"] for level in got["levels"]] == [1, 3]
    assert [level["requests"] for level in got["levels"]] == [2, 6]
    assert [level["output_tokens"] for level in got["levels"]] == [10, 30]
    for level in got["levels"]:
        assert 0 < level["ttft_p50"] <= level["ttft_p95"]
        assert level["tokens_per_second"] > 0


def test_a_server_is_measured_the_same_way(invivo: Invivo, url: str) -> None:
    ran = invivo("bench", *SMALL, "--url", url)
    assert ran.code == 0
    assert "TTFT" in ran.out


def test_prompts_beyond_the_context_are_refused(invivo: Invivo, tiny: str) -> None:
    ran = invivo("bench", "-m", tiny, "--prompt-tokens", "9999")
    assert ran.code == 2
    assert "--prompt-tokens" in ran.err


def test_cuts_have_the_length_and_different_beginnings() -> None:
    made = cuts(list(range(50)), 70, 10)
    assert all(len(cut) == 70 for cut in made)
    assert len({cut[0] for cut in made}) == 10
