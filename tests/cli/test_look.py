"""``invivo look`` and ``invivo explain`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import invivo as library
from invivo.instruments.direct_attribution import direct_attribution
from invivo.instruments.logit_lens import logit_lens

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

PROMPT = "the cat is red and the dog"
YAML = """
runs:
  cf: {prompt: hello world}
steps:
  - {at: "layers.1.attn.head.*.z", pos: "@last", do: replace, from: {run: cf, map: end}}
out:
  - {measure: logit_diff, a: " cat", b: " dog", name: gap}
sweep: {L: [0, 1, 2]}
"""


@pytest.fixture(params=["here", "served"])
def where(request: pytest.FixtureRequest, tiny: str) -> list[str]:
    return ["-m", tiny] if request.param == "here" else ["--url", request.getfixturevalue("url")]


def test_the_lens_agrees_with_the_library(invivo: Invivo, tiny: str, where: list[str]) -> None:
    with library.load(tiny, kv_bytes=8 << 20) as lm:
        expected = logit_lens(lm, PROMPT, top=2)
    got = invivo("look", PROMPT, "--top", "2", "--json", *where).json()
    assert got["ids"] == expected.ids.tolist()
    np.testing.assert_allclose(got["logprobs"], expected.logprobs, atol=1e-4)
    shown = invivo("look", PROMPT, *where)
    assert shown.code == 0
    assert "·dog" in shown.out
    assert "at layers.2.resid.post, after ·dog" in shown.out


def test_the_attribution_adds_up(invivo: Invivo, tiny: str, where: list[str]) -> None:
    words = ["--attribution", "--token", " cat", "--minus", " red"]
    got = invivo("look", PROMPT, *words, "--json", *where).json()
    assert got["word"] == " cat"
    total = got["embed"] + np.sum(got["heads"]) + np.sum(got["mlp"])
    assert total == pytest.approx(got["logit"], abs=1e-3)
    with library.load(tiny, kv_bytes=8 << 20) as lm:
        expected = direct_attribution(lm, PROMPT, token=" cat", minus=" red")
    np.testing.assert_allclose(got["heads"], expected.heads, atol=1e-4)
    shown = invivo("look", PROMPT, *words, *where)
    assert "logit of ·cat minus ·red after ·dog" in shown.out


def test_attention_of_all_heads_and_of_one(invivo: Invivo, tiny: str) -> None:
    every = invivo("look", PROMPT, "--attention", "-m", tiny)
    assert "where ·dog looks most" in every.out
    assert "head 3" in every.out
    words = ["--attention", "--at", "layers.1.attn.head.2", "-m", tiny]
    assert "layer 1, head 2: attention in %" in invivo("look", PROMPT, *words).out
    got = invivo("look", PROMPT, *words, "--json").json()
    np.testing.assert_allclose(np.sum(got["probs"], -1), 1, atol=1e-5)


def test_a_program_of_words_or_of_a_file(invivo: Invivo, tiny: str, tmp_path: Path) -> None:
    words = ["--at", "layers.*=skip", "--at", '@last?prob(" cat")', "--at", "embed.out@-1?norm"]
    got = invivo("look", PROMPT, *words, "--json", "-m", tiny).json()
    assert len(got["rows"][0]["measures"]) == len(got["rows"][0]["captures"]) == 1
    shown = invivo("look", PROMPT, *words, "-m", tiny)
    assert "prob" in shown.out
    assert "embed.out" in shown.out
    file = tmp_path / "patch.yaml"
    file.write_text(YAML)
    shown = invivo("look", PROMPT, "--program", str(file), "-m", tiny)
    assert [line.split()[0] for line in shown.out.splitlines() if line.strip()][2:] == list("012")
    assert "gap" in shown.out


def test_a_message_goes_through_the_chat_template(invivo: Invivo, where: list[str]) -> None:
    told = invivo("explain", "the cat", "--at", "embed.out=zero", "--chat", "--json", *where).json()
    assert "user" in told["runs"]["main"]["text"]
    got = invivo("look", "the cat", "--chat", "--json", *where).json()
    assert got["tokens"][-1] == "\n"


def test_edits_are_in_place_under_the_lens(invivo: Invivo, tiny: str) -> None:
    got = invivo("look", PROMPT, "--at", "layers.*=skip", "--json", "-m", tiny).json()
    assert got["ids"][0] == got["ids"][1] == got["ids"][2]


def test_tensors_come_from_files(invivo: Invivo, tiny: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    vector = np.linspace(-3, 3, 32, dtype=np.float32)
    np.save(tmp_path / "v.npy", vector)
    save_file({"way": vector}, tmp_path / "v.safetensors")
    words = ["--at", "layers.1.resid.post=add(blob:v)", "--at", "@last?logit(5)", "--json"]
    got = [
        invivo("look", PROMPT, *words, "--blob", f"v={tmp_path}/{file}", "-m", tiny).json()["rows"]
        for file in ("v.npy", "v.safetensors:way")
    ]
    assert got[0] == got[1]


@pytest.mark.parametrize("view", ["--lens", "--attribution", "--attention"])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figures_are_drawn(invivo: Invivo, tiny: str, tmp_path: Path, view: str, kind: str) -> None:
    figure = tmp_path / f"figure.{kind}"
    ran = invivo("look", "a $x_1$ <b>\n cat", view, "--figure", str(figure), "-m", tiny)
    assert ran.code == 0, ran.err
    assert figure.read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<?xml")


def test_explain_tells_and_runs_nothing(invivo: Invivo, where: list[str]) -> None:
    words = ["--at", 'layers.1.mlp.out@" red"=zero', "--at", '@last?prob(" cat")']
    shown = invivo("explain", PROMPT, *words, *where)
    assert "[0] main: zero layers.1.mlp.out at" in shown.out
    assert "(' red')" in shown.out
    got = invivo("explain", PROMPT, *words, "--json", *where).json()
    assert got["cost"]["forwards"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["look", "x", "--lens", "--attention"], "--lens: cannot go together with --attention"),
        (["look", "x", "--at", "layers.9.resid.post"], "out[0].capture"),
        (["look", "x", "--at", "a.b=zero"], "there is no site"),
        (["look", "x", "--attribution", "--at", "embed.out"], "--at: one site is read by"),
        (["look", "x", "--figure", "x.gif"], "must end in .png"),
        (["look", "x", "--figure", "/no/such/x.png"], "there is no such folder"),
        (["look", "x", "--at", "@last?prob(1)", "--figure", "x.png"], "have no figure"),
        (["look", "x", "--run", "cf=y"], "a run is there for edits"),
        (["look", "x", "--run", "cf"], "is not NAME=PROMPT"),
        (["look", "x", "--blob", "v"], "is not NAME=FILE"),
        (["look", "x", "--blob", "v=/no/such.npy"], "cannot be read"),
        (["look", "x", "--program", "/no/such"], "--program: cannot be read"),
        (["look", "x", "--attribution", "--token", "no such token"], "one is needed"),
        (["explain", "x"], "nothing to explain"),
        (["explain", "x", "--at", "embed.out"], "embed.out=zero"),
    ],
)
def test_wrong_use_is_told_in_a_line(
    invivo: Invivo, tiny: str, arguments: list[str], told: str
) -> None:
    ran = invivo(*arguments, "-m", tiny)
    assert ran.code == 2
    assert told in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_a_json_program_file(invivo: Invivo, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"steps": [{"at": "layers.0", "do": "skip"}]}))
    got = invivo("explain", PROMPT, "--program", str(file), "--json", "-m", tiny).json()
    assert [t["do"] for t in got["order"]] == ["skip"]
