"""The engine against transformers, against itself in other batches, and against trouble."""

from __future__ import annotations

import random
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.drive import Inquiry, ask, run, settle, small_engine
from tests.tiny import tiny_hf_model, tiny_model_folder
from tests.waiting import PATIENCE, held_until_cancelled

from invivo.engine.engine import Engine, EngineConfig
from invivo.engine.stats import EngineStats
from invivo.engine.types import Output, Purpose, Request, SamplingParams
from invivo.errors import (
    Conflict,
    InvalidRequest,
    InvivoError,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
)
from invivo.models.load import LoadedModel, load_model

PROMPTS = [[5, 6, 7], [100, 3, 250, 9, 40, 41, 42, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [33]]


def reference_logprobs(hf: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return hf(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="module")
def hf(tiny: LoadedModel) -> Any:
    return tiny_hf_model("llama")


# --- exactness ---------------------------------------------------------------------------------
def test_greedy_continuations_equal_those_of_transformers(tiny: LoadedModel, hf: Any) -> None:
    engine = small_engine(tiny, max_batch_tokens=33)
    some = [
        ask(engine, p, max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=2) for p in PROMPTS
    ]
    run(engine, *some)
    for inquiry in some:
        prompt, got = list(inquiry.request.tokens), inquiry.tokens()
        exact = reference_logprobs(hf, prompt + got)[len(prompt) - 1 : -1]
        assert got == exact.argmax(-1).tolist()
        assert inquiry.logprobs() == pytest.approx(exact.max(-1).values.tolist(), abs=1e-4)
        assert inquiry.reason() == "length"


def test_scores_equal_those_of_transformers(tiny: LoadedModel, hf: Any) -> None:
    text = [random.Random(1).randrange(290) for _ in range(100)]
    exact = reference_logprobs(hf, text)
    expected = [float(exact[i - 1, text[i]]) for i in range(1, len(text))]
    engine = small_engine(tiny, max_batch_tokens=33)  # in four chunks
    whole = ask(engine, text, kind="score", prompt_logprobs=3)
    tail = ask(engine, text, kind="score", score_from=90)
    run(engine, whole, tail)
    assert whole.prompt_logprobs() == pytest.approx(expected, abs=1e-4)
    assert tail.prompt_logprobs() == pytest.approx(expected[89:], abs=1e-4)
    record = whole.outputs[-1].prompt_logprobs
    assert record is not None
    assert [r.token for r in record] == text[1:]
    assert [t for t, _ in record[5].top] == exact[5].topk(3).indices.tolist()
    assert record[5].rank == 1 + int((exact[5] > exact[5, text[6]]).sum())


def test_prompt_log_probabilities_come_with_the_first_output(tiny: LoadedModel, hf: Any) -> None:
    engine = small_engine(tiny)
    prompt = PROMPTS[1]
    inquiry = ask(engine, prompt, n=2, max_tokens=3, prompt_logprobs=1, temperature=0.0)
    again = ask(engine, prompt, max_tokens=3, prompt_logprobs=1, temperature=0.0)
    run(engine, inquiry, again)
    exact = reference_logprobs(hf, prompt)
    expected = [float(exact[i - 1, prompt[i]]) for i in range(1, len(prompt))]
    assert inquiry.prompt_logprobs() == pytest.approx(expected, abs=1e-4)
    assert inquiry.of(0)[0].prompt_logprobs is not None
    assert all(o.prompt_logprobs is None for o in inquiry.of(0)[1:] + inquiry.of(1))
    assert again.prompt_logprobs() == pytest.approx(expected, abs=1e-4)


def test_embeddings_are_pooled_final_states_in_any_chunks(tiny: LoadedModel, hf: Any) -> None:
    text = [random.Random(2).randrange(290) for _ in range(70)]
    with torch.inference_mode():
        states = hf.model(torch.tensor([text])).last_hidden_state[0]
    for budget in (33, 128):
        engine = small_engine(tiny, max_batch_tokens=budget)
        mean = ask(engine, text, kind="embed")
        last = ask(engine, text, kind="embed", pooling="last")
        run(engine, mean, last)
        assert mean.outputs[-1].embedding == pytest.approx(states.mean(0).tolist(), abs=1e-4)
        assert last.outputs[-1].embedding == pytest.approx(states[-1].tolist(), abs=1e-4)


def test_long_texts_of_longrope_models_get_the_long_angles(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.5],
        "long_factor": [4.0, 9.0],
    }
    options = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    engine = small_engine(load_model(str(tiny_model_folder(tmp_path, "phi3", **options))))
    hf = tiny_hf_model("phi3", **options)
    text = [random.Random(3).randrange(290) for _ in range(60)]
    short, long = (ask(engine, text[:n], kind="score") for n in (30, 60))
    grown = ask(engine, text[:20], max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=0)
    run(engine, short, long, grown)  # the prefix cache may not mix the two kinds
    for inquiry in (short, long):
        tokens = list(inquiry.request.tokens)
        exact = reference_logprobs(hf, tokens)
        expected = [float(exact[i - 1, tokens[i]]) for i in range(1, len(tokens))]
        assert inquiry.prompt_logprobs() == pytest.approx(expected, abs=1e-4)
    exact = reference_logprobs(hf, text[:20] + grown.tokens())[19:-1]
    assert grown.logprobs() == pytest.approx(exact.max(-1).values.tolist(), abs=1e-4)


# --- isolation and determinism -----------------------------------------------------------------
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.8, "temperature": 1.3},
    {"seed": 3, "top_k": 5, "repetition_penalty": 1.3},
    {"seed": 4, "min_p": 0.05, "frequency_penalty": 0.5, "min_tokens": 10},
    {"temperature": 0.0, "presence_penalty": 1.5},
]


def answers_of(engine: Engine, order: list[int], together: bool) -> dict[int, Inquiry]:
    out = {}
    for i in order:
        prompt = PROMPTS[i % len(PROMPTS)]
        out[i] = ask(engine, prompt, max_tokens=14, logprobs=0, **ASKED[i])
        if not together:
            run(engine, out[i])
    run(engine, *out.values())
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        {"max_batch_tokens": 9, "max_running": 8},
        {"prefix_cache": False},
        {"max_running": 2, "max_batch_tokens": 16},
    ],
    ids=["plain", "overlapped", "small chunks", "no prefix cache", "two rows"],
)
def test_answers_do_not_depend_on_the_batch(tiny: LoadedModel, options: dict[str, Any]) -> None:
    order = list(range(len(ASKED)))
    alone = answers_of(small_engine(tiny), order, together=False)
    random.Random(0).shuffle(order)
    beside = answers_of(small_engine(tiny, **options), order, together=True)
    for i in order:
        assert beside[i].tokens() == alone[i].tokens()
        assert beside[i].text() == alone[i].text()
        assert beside[i].reason() == alone[i].reason()
        assert beside[i].logprobs() == pytest.approx(alone[i].logprobs(), abs=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_answers_equal_undisturbed_ones(tiny: LoadedModel, overlap: bool) -> None:
    asked = {"max_tokens": 60, "seed": 9, "ignore_eos": True, "logprobs": 0}
    calm = small_engine(tiny)
    expected = [ask(calm, [i, 7, 7], **asked) for i in range(6)]
    run(calm, *expected)
    per_block = 2 * 3 * 2 * 8 * 4 * 16
    tight = small_engine(tiny, kv_bytes=9 * per_block, overlap=overlap)
    got = [ask(tight, [i, 7, 7], **asked) for i in range(6)]
    run(tight, *got)
    assert tight.scheduler.n_preemptions > 0
    for one, other in zip(got, expected, strict=True):
        assert one.tokens() == other.tokens()
        assert one.logprobs() == pytest.approx(other.logprobs(), abs=1e-5)


def test_samples_of_one_request_differ_and_repeat(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    first = ask(engine, [1, 2, 3], n=4, seed=5, max_tokens=10)
    single = ask(engine, [1, 2, 3], seed=5, max_tokens=10)
    free = [ask(engine, [1, 2, 3], max_tokens=10) for _ in range(2)]
    run(engine, first, single, *free)
    assert len({tuple(first.tokens(i)) for i in range(4)}) == 4
    assert first.tokens(0) == single.tokens()
    assert free[0].tokens() != free[1].tokens()
    assert sum(o.final for o in first.outputs) == 1
    assert first.outputs[-1].final


def test_a_shared_prefix_is_computed_once(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    prompt = list(range(40))
    cold = ask(engine, prompt, max_tokens=5, temperature=0.0)
    run(engine, cold)
    warm = ask(engine, prompt, max_tokens=5, temperature=0.0)
    other = ask(engine, prompt, max_tokens=5, temperature=0.0, salt="tenant")
    run(engine, warm, other)
    assert warm.tokens() == other.tokens() == cold.tokens()
    assert [i.outputs[-1].cached_tokens for i in (cold, warm, other)] == [0, 32, 0]


# --- ends --------------------------------------------------------------------------------------
def spoken(model: LoadedModel, tokens: list[int]) -> str:
    return str(model.tokenizer.decode(tokens))


@pytest.fixture(scope="module")
def words(tiny: LoadedModel) -> Inquiry:
    """A long sample whose text is used to choose stop strings."""
    engine = small_engine(tiny)
    inquiry = ask(engine, [1, 2, 3], max_tokens=60, seed=3, ignore_eos=True)
    run(engine, inquiry)
    return inquiry


def test_stop_strings_end_the_text_before_the_match(tiny: LoadedModel, words: Inquiry) -> None:
    text = words.text()
    stop = text[10:14]
    engine = small_engine(tiny)
    for asked in ({"stop": (stop,)}, {"stop": ("never seen", stop)}):
        inquiry = ask(engine, [1, 2, 3], max_tokens=60, seed=3, ignore_eos=True, **asked)
        run(engine, inquiry)
        assert inquiry.text() == text[: text.index(stop)]
        assert inquiry.reason() == "stop"
        assert inquiry.outputs[-1].stop_match == stop
        assert words.tokens()[: len(inquiry.tokens())] == inquiry.tokens()


def test_stop_strings_wait_for_min_tokens(tiny: LoadedModel, words: Inquiry) -> None:
    stop = words.text()[:1]
    engine = small_engine(tiny)
    inquiry = ask(
        engine, [1, 2, 3], max_tokens=60, min_tokens=60, seed=3, ignore_eos=True, stop=(stop,)
    )
    run(engine, inquiry)
    assert inquiry.tokens() == words.tokens()


def test_stop_tokens_and_end_tokens_end_without_text(tiny: LoadedModel, words: Inquiry) -> None:
    engine = small_engine(tiny)
    stop = words.tokens()[7]
    at = words.tokens().index(stop)
    inquiry = ask(engine, [1, 2, 3], max_tokens=60, seed=3, ignore_eos=True, stop_token_ids=(stop,))
    (eos,) = tiny.config.eos_token_ids
    ended = ask(engine, [1, 2, 3], max_tokens=9, temperature=0.0, logit_bias=((eos, 100.0),))
    ignored = ask(
        engine, [1], max_tokens=3, temperature=0.0, logit_bias=((eos, 100.0),), ignore_eos=True
    )
    run(engine, inquiry, ended, ignored)
    assert inquiry.tokens() == words.tokens()[: at + 1]
    assert spoken(tiny, words.tokens()[:at]).startswith(inquiry.text())
    assert inquiry.outputs[-1].stop_match == stop
    assert (ended.tokens(), ended.text(), ended.reason()) == ([eos], "", "stop")
    assert (ignored.tokens(), ignored.reason()) == ([eos] * 3, "length")


def test_an_output_ends_where_the_context_is_full(tiny: LoadedModel) -> None:
    engine = small_engine(tiny, max_model_len=40)
    inquiry = ask(engine, list(range(30)), ignore_eos=True)
    run(engine, inquiry)
    assert len(inquiry.tokens()) == 10
    assert inquiry.reason() == "length"


# --- cancelling and failing --------------------------------------------------------------------
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_cancelling_gives_everything_back(tiny: LoadedModel, after: int, overlap: bool) -> None:
    engine = small_engine(tiny, max_batch_tokens=33, overlap=overlap)
    some = [
        ask(engine, list(range(60)), max_tokens=30, ignore_eos=True, n=2),
        ask(engine, list(range(70)), kind="embed"),
        ask(engine, list(range(80)), kind="score"),
        ask(engine, [1], max_tokens=30, ignore_eos=True),
    ]
    for _ in range(after):
        engine.step()
    for inquiry in some[:3]:
        engine.abort(inquiry.request.id)
    engine.abort("unknown")
    run(engine, *some)
    for inquiry in some[:3]:
        for index in range(inquiry.request.n):
            ends = [o for o in inquiry.of(index) if o.finish_reason]
            assert len(ends) == 1
    assert some[3].reason() == "length"
    assert len(some[3].tokens()) == 30


def test_a_failing_step_ends_its_requests_and_no_others(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(tiny, max_batch_tokens=40)
    undisturbed = ask(engine, [1, 2], max_tokens=8, temperature=0.0)
    run(engine, undisturbed)
    victim = ask(engine, list(range(20)), max_tokens=8, n=2)
    engine.step()
    real = engine._stepper.launch

    def broken(*args: Any) -> Any:
        raise RuntimeError("the device burns")

    monkeypatch.setattr(engine._stepper, "launch", broken)
    engine.step()
    monkeypatch.setattr(engine._stepper, "launch", real)
    assert victim.done
    assert isinstance(victim.outputs[-1].error, InvivoError)
    assert "burns" not in str(victim.outputs[-1].error)
    later = ask(engine, [1, 2], max_tokens=8, temperature=0.0)
    run(engine, later)
    assert later.tokens() == undisturbed.tokens()
    assert engine.stats().totals["error"] == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_collection_ends_its_requests(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    engine = small_engine(tiny, overlap=overlap)
    some = [ask(engine, [i], max_tokens=8, ignore_eos=True) for i in range(3)]
    engine.step()
    engine.step()
    real = engine._stepper.collect

    def broken(launched: Any) -> Any:
        monkeypatch.setattr(engine._stepper, "collect", real)
        raise RuntimeError("lost")

    monkeypatch.setattr(engine._stepper, "collect", broken)
    run(engine, *some)
    assert all(i.reason() == "error" for i in some)


def test_a_receiver_that_raises_is_cancelled_alone(
    tiny: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    engine = small_engine(tiny)
    good = ask(engine, [1], max_tokens=10, ignore_eos=True)

    def bad(output: Output) -> None:
        raise ValueError("no thanks")

    params = SamplingParams(max_tokens=10, ignore_eos=True)
    engine.submit(Request(id="bad", tokens=(1, 2), params=params), bad)
    run(engine, good)
    assert len(good.tokens()) == 10
    assert engine.stats().totals["cancelled"] == 1
    assert "no thanks" in caplog.text


def test_an_adapter_that_cannot_be_placed_ends_its_request_alone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(tiny)
    width = tiny.config.d_model
    engine.adapters.load(
        "a",
        (
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]},
            {
                "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(
                    2, tiny.config.n_heads * tiny.config.head_dim
                ),
                "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": torch.ones(
                    width, 2
                ),
            },
        ),
    )
    good = ask(engine, [1], max_tokens=6, ignore_eos=True)
    engine.step()

    def no_room(*_: object) -> int:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(engine.adapters, "place", no_room)
    bad = ask(engine, [1, 2], adapter="a", max_tokens=6)
    run(engine, good, bad)
    assert len(good.tokens()) == 6
    assert bad.reason() == "error"
    monkeypatch.undo()
    settle(engine)


# --- refusing ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logit_bias": ((5000, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 17}, "stop"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"seed": 2**65}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"kind": "embed", "n": 2}, "n"),
        ({"kind": "score", "score_from": 3}, "score_from"),
        ({"kind": "dream"}, "kind"),
        ({"kind": "embed", "pooling": "max"}, "pooling"),
        ({"id": ""}, "id"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(
    fields: dict[str, Any], name: str, tiny: LoadedModel
) -> None:
    engine = small_engine(tiny)
    with pytest.raises(InvalidRequest) as error:
        ask(engine, [1, 2, 3], **fields)
    assert error.value.field == name
    settle(engine)


def test_prompts_are_checked(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    for tokens in ([], [-1], [tiny.config.vocab_size]):
        with pytest.raises(InvalidRequest, match="prompt"):
            ask(engine, tokens)
    with pytest.raises(TooLarge):
        ask(engine, [1] * 256)
    with pytest.raises(InvalidRequest):
        ask(engine, [1], kind="score")
    with pytest.raises(NotFound):
        ask(engine, [1], adapter="none")
    ask(engine, [1], id="same", max_tokens=1)
    with pytest.raises(Conflict):
        ask(engine, [1], id="same", max_tokens=1)
    settle(engine)


def test_a_full_queue_refuses(tiny: LoadedModel) -> None:
    engine = small_engine(tiny, max_running=2, max_waiting=3)
    some = [ask(engine, [1], max_tokens=2, n=n) for n in (2, 3)]
    with pytest.raises(Overloaded):
        ask(engine, [1], max_tokens=2)
    run(engine, *some)
    run(engine, ask(engine, [1], max_tokens=2))


def test_sizes_that_do_not_fit_are_refused(tiny: LoadedModel) -> None:
    for options in (
        {"max_model_len": 100_000},
        {"kv_bytes": 10},
        {"max_running": 300},
    ):
        with pytest.raises(InvalidRequest):
            small_engine(tiny, **options)


# --- its own thread ----------------------------------------------------------------------------
def test_many_threads_submit_and_cancel(tiny: LoadedModel) -> None:
    alone = small_engine(tiny)
    expected = ask(alone, [3, 1, 4], max_tokens=12, seed=8)
    run(alone, expected)
    engine = small_engine(tiny, max_running=8, max_batch_tokens=64)
    engine.start()
    done: list[list[int]] = []
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for turn in range(5):
                ended = threading.Event()
                inquiry = Inquiry(
                    Request(
                        id=f"{number}-{turn}",
                        tokens=(3, 1, 4),
                        params=SamplingParams(max_tokens=12, seed=8),
                    )
                )

                def receive(
                    output: Output, inquiry: Inquiry = inquiry, ended: threading.Event = ended
                ) -> None:
                    inquiry.outputs.append(output)
                    if output.final:
                        ended.set()

                engine.submit(inquiry.request, receive)
                if (number + turn) % 3 == 0:
                    engine.abort(inquiry.request.id)
                assert ended.wait(PATIENCE)
                if inquiry.reason() != "cancelled":
                    done.append(inquiry.tokens())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures
    assert len(done) >= 12 * 5 * 2 // 3
    assert all(tokens == expected.tokens() for tokens in done)
    assert engine.scheduler.blocks_used == 0
    engine.close()
    engine.close()
    with pytest.raises(Unavailable):
        ask(engine, [1])


def test_closing_cancels_or_drains(tiny: LoadedModel) -> None:
    for drain in (False, True):
        engine = small_engine(tiny)
        engine.start()
        with nullcontext() if drain else held_until_cancelled(engine):
            inquiry = ask(engine, [1], max_tokens=100, ignore_eos=True)
            engine.close(drain=drain)
        assert inquiry.done
        assert inquiry.reason() == ("length" if drain else "cancelled")


def test_an_engine_without_tokenizer_gives_tokens(tmp_path: Path) -> None:
    model = load_model(str(tiny_model_folder(tmp_path)))
    model.tokenizer = None
    engine = Engine(model, EngineConfig(kv_bytes=1 << 20))
    inquiry = ask(engine, [1, 2], max_tokens=5, temperature=0.0, ignore_eos=True)
    run(engine, inquiry)
    assert len(inquiry.tokens()) == 5
    assert inquiry.text() == ""


# --- counting ----------------------------------------------------------------------------------
def test_statistics_add_up(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    some = [ask(engine, [1, 2, 3, 4], max_tokens=6, ignore_eos=True) for _ in range(3)]
    scored = ask(engine, list(range(20)), kind="score")
    run(engine, *some, scored)
    stats = engine.stats()
    assert stats.totals["prefill"] == 3 * 4
    assert stats.totals["decode"] == 3 * 5
    assert stats.totals["score"] == 20
    assert stats.totals["requests"] == 4
    assert stats.totals["length"] == 3
    assert stats.totals["stop"] == 1
    assert sum(stats.histograms["itl"]["counts"]) == 3 * 5
    assert sum(stats.histograms["ttft"]["counts"]) == 3
    assert sum(stats.histograms["e2e"]["counts"]) == 4
    assert len(stats.histograms["e2e"]["counts"]) == len(stats.histograms["e2e"]["le"]) + 1
    assert stats.latency["ttft"]["count"] == 3
    assert stats.latency["itl"]["p50"] <= stats.latency["itl"]["p99"]
    assert [r["state"] for r in stats.recent] == ["stop", "length", "length", "length"]
    assert stats.recent[-1]["output_tokens"] == 6
    purposes = {"decode", "prefill", "score", "train", "backward"}
    assert set(stats.tokens) == {"seconds"} | purposes
    assert {p.name.lower() for p in Purpose} <= set(stats.totals)


def test_an_answer_is_counted_before_it_is_told(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    told: list[EngineStats] = []

    def receive(output: Output) -> None:
        if output.final:
            told.append(engine.stats())

    params = SamplingParams(max_tokens=6, ignore_eos=True)
    engine.submit(Request(id="a", tokens=(1, 2, 3, 4), params=params), receive)
    while not told:
        engine.step()
    (stats,) = told
    assert (stats.totals["prefill"], stats.totals["decode"]) == (4, 5)
    assert (stats.totals["generated"], stats.totals["length"]) == (6, 1)
    assert sum(stats.histograms["itl"]["counts"]) == 5
    assert stats.running == stats.waiting == stats.kv["used"] == 0


def test_an_engine_whose_scheduler_breaks_tells_everyone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(tiny)
    ended = threading.Semaphore(0)
    outputs: dict[str, Output] = {}

    def receive(output: Output) -> None:
        if output.final:
            outputs[output.request_id] = output
            ended.release()

    def broken(*_: object) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr(engine.scheduler, "schedule", broken)
    monkeypatch.setattr(engine.scheduler, "finish", broken)
    for name in ("a", "b", "c"):
        engine.submit(Request(id=name, tokens=(1, 2)), receive)
    engine.start()
    for _ in range(3):
        assert ended.acquire(timeout=PATIENCE), f"only {sorted(outputs)} were told"
    assert all(isinstance(output.error, InvivoError) for output in outputs.values())
    assert engine.failure is not None
    engine.close()


def test_what_the_scheduler_compares_is_checked(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    for field, value in (("priority", "high"), ("priority", 0.5), ("salt", ["x"])):
        with pytest.raises(InvalidRequest) as caught:
            ask(engine, [1, 2], **{field: value})
        assert caught.value.field == field
    run(engine, ask(engine, [1, 2], priority=-1, salt="x", max_tokens=2))
