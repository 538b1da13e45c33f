"""Stop strings against a search in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llava_engine.text.stop import StopFinder

PIECES = st.lists(st.text("ab", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3).map(tuple)


def first_end(text, stop):
    """Where, reading letter by letter, a stop string is complete for the first time."""
    ends = range(len(text) + 1)
    return next((end for end in ends if any(map(text[:end].endswith, stop))), None)


@given(pieces=PIECES, stop=STOPS)
def test_text_ends_before_the_stop_string_that_is_complete_first(pieces, stop):
    finder = StopFinder(stop)
    text, seen = "", ""
    for piece in pieces:
        seen += piece
        text += finder.push(piece)
        end = first_end(seen, stop)
        assert finder.found == (end is not None)
        if end is not None:
            longest = max(len(string) for string in stop if seen[:end].endswith(string))
            assert text == seen[: end - longest]
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
