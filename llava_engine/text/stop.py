"""Stop strings over a stream of text pieces. Knows nothing of tokens."""

from __future__ import annotations


class StopFinder:
    """Passes text on until a stop string appears, holding back what may be the start of one.

    The stop string that is complete first counts, and of several that end together the longest; so
    the pieces in which the text comes make no difference.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain now. After a match `found` is true and only the text before
        the stop string is returned."""
        if not self._stop:
            return piece
        text = self._held + piece
        starts = [(text.find(stop), len(stop)) for stop in self._stop]
        matches = [(start + length, start) for start, length in starts if start >= 0]
        if matches:
            self.found = True
            self._held = ""
            return text[: min(matches)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
