"""``invivo plan``: the table, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from invivo.cli.plan import layer_ranges, parse_layers, parse_size
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    return str(path)


def test_a_plan_is_printed_for_a_config_alone(invivo: Invivo, config_file: str) -> None:
    ran = invivo("plan", config_file, "--lora", "r=4", "--on", "down_proj", "--length", "128")
    assert ran.code == 0, ran.err
    for word in (
        "mlp.gate",
        "kept (tape)",
        "kept (cache)",
        "rebuilt",
        "graph pruning",
        "v2 layer-",
    ):
        assert word in ran.out
    assert "dropped" not in ran.out
    assert "2,688 trained numbers" in ran.out
    assert "dropped" in invivo("plan", config_file, "--ia3", "--all").out


def test_the_plan_as_json_has_every_tensor_and_order(invivo: Invivo, config_file: str) -> None:
    told: dict[str, Any] = invivo(
        "plan", config_file, "--lora", "4", "--window", "32", "--json"
    ).json()
    assert told["window"] == 32
    assert {row["verdict"] for row in told["rows"]} == {"kept", "rebuilt", "dropped"}
    assert told["schedules"][0]["name"] == "v1 window-outer"
    assert told["totals"]["naive"] > told["totals"]["pruned"] > told["totals"]["compressed"]
    lean = invivo("plan", config_file, "--lora", "4", "--rerun", "gate,up", "--json").json()
    assert lean["totals"]["compressed"] < told["totals"]["compressed"]


def test_a_tape_is_cut_to_the_bytes_allowed(invivo: Invivo, config_file: str) -> None:
    def tape(*options: str) -> int:
        ran = invivo("plan", config_file, "--lora", "r=4", "--length", "128", "--json", *options)
        assert ran.code == 0, ran.err
        return int(json.loads(ran.out)["totals"]["compressed"])

    whole = tape()
    assert whole // 3 < tape("--tape-bytes", str(whole // 2)) <= whole // 2
    ran = invivo("plan", config_file, "--lora", "r=4", "--length", "128", "--tape-bytes", "1")
    assert ran.code != 0
    assert "tape_bytes" in ran.err


def test_what_the_device_has_no_room_for_is_shown_on_the_host(
    invivo: Invivo, config_file: str
) -> None:
    given = ("plan", config_file, "--lora", "r=4", "--on", "down_proj", "--length", "128")
    whole = invivo(*given, "--json").json()["totals"]["compressed"]
    host = ("--tape-bytes", str(whole // 2), "--host-bytes", "10000000", "--host-gb-per-s", "1e9")
    told = invivo(*given, *host, "--json").json()
    assert told["totals"]["hosted"] > 0
    assert told["totals"]["compressed"] <= whole // 2
    last = told["schedules"][-1]["parts"]
    assert last["tape"] + last["copies"] == whole // 2
    shown = invivo(*given, *host).out
    assert "kept (host)" in shown
    assert "and in host memory" in shown
    ran = invivo(*given, "--host-bytes", "10000000")
    assert ran.code != 0
    assert "tape_bytes" in ran.err


def test_bypasses_can_be_combined_and_put_on_some_layers(invivo: Invivo, config_file: str) -> None:
    both = invivo(
        "plan", config_file, "--lora", "r=4", "--steering", "--prefix", "n=2", "--layers", "1-2",
        "--json",
    ).json()  # fmt: skip
    lora, steering, prefix = 2 * 4 * (160 + 64), 2 * 64, 2 * 2 * 2 * 2 * 16
    assert both["trained"]["parameters"] == lora + steering + prefix


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to train"),
        (["--lora", "r=x"], "--lora"),
        (["--lora", "r=4", "--on", "nowhere"], "q_proj"),
        (["--lora", "r=4", "--layers", "3"], "3 layers"),
        (["--lora", "r=4", "--layers", "2-1"], "--layers"),
        (["--ia3", "--dtype", "int8"], "dtype"),
        (["--ia3", "--rerun", "down"], "rerun"),
    ],
)
def test_wrong_requests_end_with_one_clear_line(
    invivo: Invivo, config_file: str, arguments: list[str], said: str
) -> None:
    ran = invivo("plan", config_file, *arguments)
    assert ran.code == 2
    assert said in ran.err


def test_help_has_examples(invivo: Invivo) -> None:
    ran = invivo("plan", "--help")
    assert (ran.code, "invivo plan" in ran.out, "Examples" in ran.out) == (0, True, True)


def test_sizes_and_layers_are_read_and_written() -> None:
    assert parse_size("r=16", "--lora") == parse_size(" 16 ", "--lora") == 16
    assert parse_layers("0, 4,8-10") == (0, 4, 8, 9, 10)
    assert parse_layers(None) is None
    assert layer_ranges((0, 4, 8, 9, 10)) == "0, 4, 8-10"
    assert layer_ranges(()) == "-"
    with pytest.raises(InvalidRequest):
        parse_layers("a")
