"""Stop strings against a search in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llava_engine.text.stop import StopFinder

PIECES = st.lists(st.text("ab", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3).map(tuple)


@given(pieces=PIECES, stop=STOPS)
def test_text_ends_before_the_stop_string_that_is_complete_first(pieces, stop):
    finder = StopFinder(stop)
    text, seen = "", ""
    for piece in pieces:
        seen += piece
        text += finder.push(piece)
        places = [seen.find(string) for string in stop if string in seen]
        assert finder.found == bool(places)
        if places:
            assert text == seen[: min(places)]
            return
        assert seen.startswith(text)
        # Nothing is held back but what may yet become a stop string.
        held = seen[len(text) :]
        assert not held or any(string.startswith(held) for string in stop)
    assert text + finder.flush() == seen
    assert finder.flush() == ""


def test_a_stop_string_over_several_pieces():
    finder = StopFinder(("\nUSER:",))
    assert [
        finder.push(piece)
        for piece in (
            "A cat.",
            "\nUS",
            "A",
            "\n",
            "USER",
            ":",
        )
    ] == [
        "A cat.",
        "",
        "\nUSA",
        "",
        "",
        "",
    ]
    assert finder.found
