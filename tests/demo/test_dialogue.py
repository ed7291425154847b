"""The dialogues that the demo learns."""

from __future__ import annotations

from invivo.demo.dialogue import ANSWERED, ASKED, HELD_OUT, exchanges, speeches
from invivo.jobs.records import Chat, parse_record


def test_speeches_have_a_speaker_and_words() -> None:
    found = list(speeches())
    assert len(found) > 500
    assert (found[0].speaker, found[0].text) == (
        "SAMPSON",
        "Gregory, o' my word, we'll not carry coals.",
    )
    assert all(speech.text.strip() and "\n\n" not in speech.text for speech in found)


def test_exchanges_have_their_lengths_and_make_valid_examples() -> None:
    learned, held_out = exchanges()
    assert len(held_out) == HELD_OUT
    assert len(learned) > 120
    for each in learned + held_out:
        assert ASKED[0] <= len(each.asked) <= ASKED[1]
        assert ANSWERED[0] <= len(each.answered) <= ANSWERED[1]
        record = parse_record({"messages": each.messages()})
        assert isinstance(record, Chat)
        assert record.learned == [False, True]


def test_nothing_that_is_held_out_is_seen_while_learning() -> None:
    learned, held_out = exchanges()
    seen = {each.asked for each in learned} | {each.answered for each in learned}
    assert not seen & {each.asked for each in held_out}
    assert not seen & {each.answered for each in held_out}
