"""A model that answers what a test says, in the place of the real ones."""

from __future__ import annotations

import pytest

import llava_engine
from llava_engine import errors
from llava_engine.channel import Channel
from llava_engine.stream import ChunkStream
from llava_engine.types import FinishReason, SamplingParams


class Words:
    """A detokenizer for answers that are lists of words."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def push(self, token_id: int) -> str:
        return self._words[token_id]

    def flush(self) -> str:
        return ""


class FakeModel:
    """Answers with given words, or fails, and remembers what it was asked."""

    registry_key = "a model that the process's pool has not"

    def __init__(self, words: list[str], error: Exception | None = None) -> None:
        self.words, self.error = words, error
        self.calls: list[tuple[str, object, str, dict[str, object]]] = []

    def describe_image(self, image, query, *, timeout=None, **sampling):
        return self._answer("image", image, query, timeout=timeout, **sampling)

    def describe_url(self, url, query, *, timeout=None, **sampling):
        return self._answer("url", url, query, timeout=timeout, **sampling)

    def _answer(self, kind, picture, query, *, timeout, **sampling):
        SamplingParams(**sampling)
        self.calls.append((kind, picture, query, {"timeout": timeout, **sampling}))
        channel = Channel()
        channel.bind(Words(self.words), 12, 4)
        for index in range(len(self.words)):
            channel.put(index)
        if self.error is None:
            channel.finish(FinishReason.STOP)
        elif isinstance(self.error, errors.LlavaError):
            channel.fail(self.error)
        else:
            raise self.error
        return ChunkStream(channel)


@pytest.fixture
def answer(monkeypatch):
    """Put a FakeModel behind `llava_engine.get`; returns it and what `get` was called with."""

    def answer(*words: str, error: Exception | None = None, get_error: Exception | None = None):
        model = FakeModel(list(words), error)

        def get(name, config=None):
            model.got = (name, config)
            if get_error is not None:
                raise get_error
            return model

        monkeypatch.setitem(vars(llava_engine), "get", get)
        return model

    return answer
