"""Token ids to text, bit by bit: what the pieces add up to is exactly the decode of all ids.

The `tokenizers` library's own DecodeStream is not used: with byte fallback it emits characters
that later bytes take back, and fails at bytes that make no character.
"""

from __future__ import annotations

import codecs
import re
from functools import cache

from llava_engine.text.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """Follows one answer. Constant time per token; never emits half a character.

    With byte fallback a run of byte tokens is text only when its last byte is known to be the
    last, since one wrong byte turns the whole run into U+FFFD; such a run is held until it ends.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoding = tokenizer.decoding
        self._strip_left = tokenizer.decoding.strip_count
        self._run = bytearray()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; special tokens and unknown ids have none."""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        if self._decoding.byte_level:
            return self._utf8.decode(_byte_level(piece))
        for old, new in self._decoding.replace:
            piece = piece.replace(old, new)
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._stripped(self._end_run() + piece)

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        if self._decoding.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        """The text of the byte tokens so far: all of it, or U+FFFD for each byte."""
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        """`text` without what the decoder strips from the beginning of the whole answer."""
        while text and self._strip_left:
            if text[0] != self._decoding.strip:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


def _byte_level(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for; its own text's if it is no such piece."""
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in piece)
    except KeyError:
        return piece.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for 256 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
