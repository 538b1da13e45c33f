"""A request on its way through the pool: what was asked, and the channel that answers.

Knows nothing of models, threads or memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_engine.channel import Channel
from llava_engine.errors import (
    ImageDecodeError,
    LlavaError,
    MemoryExhausted,
    ModelError,
    RequestFailed,
)
from llava_engine.image.budget import ByteBudget
from llava_engine.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    from llava_engine.pool.worker import Worker

_LONGEST_TEXT = 200  # characters of an error's that are quoted


@dataclass(eq=False, slots=True)
class Request:
    """One call of describe_image or describe_url.

    image: a picture as `image.load.load_image` takes it; None while a URL is to be fetched.
    fetches: the pool's memory for downloads.
    worker: who has it; None while the model has no worker.
    """

    registry_key: str
    query: str
    sampling: SamplingParams
    channel: Channel
    fetches: ByteBudget
    image: Any = None
    url: str | None = None
    priority: int = 0
    cache_salt: str = ""
    worker: Worker | None = None

    @property
    def waiting(self) -> bool:
        """Whether it still stands in the queue: not admitted to a batch, and wanted."""
        return not self.channel.started and not self.channel.cancelled

    @property
    def paused(self) -> bool:
        """Whether it stands still until its reader has caught up; see ChunkStream."""
        return self.channel.room <= 0 and not self.channel.cancelled

    @property
    def outcome(self) -> str:
        """How it ended, in a word: a finish reason or the error's name."""
        if self.channel.error is not None:
            return type(self.channel.error).__name__
        return str(self.channel.reason)

    @property
    def succeeded(self) -> bool:
        """Whether the model answered to the end, or to a stop string."""
        return self.channel.reason in (FinishReason.STOP, FinishReason.LENGTH)

    @property
    def model_failed(self) -> bool:
        """Whether the error speaks against the model, rather than the picture or the load.

        A worker's death and a failed spawn do too, but are counted once, not per request.
        """
        return isinstance(self.channel.error, RequestFailed | ModelError)


def as_llava_error(error: BaseException) -> LlavaError:
    """What a request raises for an exception of its preparation."""
    if isinstance(error, LlavaError):
        return error
    wrapped: LlavaError
    if isinstance(error, MemoryError):
        wrapped = MemoryExhausted("Memory ran out while this request was prepared.")
    elif not isinstance(error, Exception):
        # SystemExit and the like, which nothing raises here but the caller's own picture.
        kind = type(error).__name__
        wrapped = ImageDecodeError(f"reading the picture raised {kind}")
    else:
        wrapped = RequestFailed(f"The request could not be prepared: {type(error).__name__}.")
    wrapped.__cause__ = error
    return wrapped


def in_short(error: BaseException) -> str:
    """What an error says, for the text of another: one line of a bounded length, and no path that
    the operating system put there."""
    try:
        said = str(error)
    except Exception:  # a loader's own may have any bug
        said = ""
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror
    line = next(iter(said.strip().splitlines()), "")
    if len(line) > _LONGEST_TEXT:
        line = f"{line[:_LONGEST_TEXT]}..."
    if isinstance(error, LlavaError) and line:
        return line
    kind = type(error).__name__
    return f"{kind}: {line}" if line else kind


def copy_of(error: LlavaError, cause: BaseException | None = None) -> LlavaError:
    """An error of the same content and another cause, with no traceback."""
    copy = type(error).__new__(type(error), *error.args)  # a loader's own may take other arguments
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = cause
    return copy
