"""Stop strings over a stream of text pieces. Knows nothing of tokens."""

from __future__ import annotations


class StopFinder:
    """Passes text on until a stop string appears, holding back what may be the start of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain now. After a match `found` is true and only the text before
        the earliest stop string is returned."""
        if not self._stop:
            return piece
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.found = True
            self._held = ""
            return text[: min(places)]
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
