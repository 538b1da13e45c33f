"""Every exception that llava_engine raises on purpose.

    LlavaError
    ├── ModelError
    │   ├── UnknownModel        no model of that name
    │   ├── WeightsError        a tensor or file of a checkpoint is missing, surplus or mis-shaped
    │   ├── UnsupportedModel    a configuration that this engine does not implement
    │   └── KernelsNotBuilt     the CUDA library is needed and not there
    ├── ImageError
    │   ├── ImageFetchError     a URL gave no picture
    │   │   ├── BlockedAddress  the URL leads to an address that may not be reached
    │   │   ├── FetchFailed     the server or the network failed
    │   │   └── FetchTimeout    the fetch ran past its deadline
    │   ├── ImageTooLarge       more bytes or pixels than allowed
    │   └── ImageDecodeError    not a picture, or a broken one
    ├── RequestError
    │   ├── PromptTooLong       picture and query do not fit the model's context
    │   ├── InvalidQuery        text that cannot be encoded (NUL, lone surrogates)
    │   ├── RequestTimeout      the request's deadline passed
    │   ├── RequestCancelled    the caller cancelled and then asked for the text
    │   └── RequestFailed       an unexpected failure of this request alone; see __cause__
    └── PoolError
        ├── MemoryExhausted     no room for a worker, or for this request
        ├── SpawnFailed         a worker could not load its model; see __cause__
        ├── NoWorkers           the model has no live worker
        ├── PoolOverloaded      the queue is full; `retry_after` says when to try again
        ├── CircuitOpen         the model failed too often; `retry_after` says when to try again
        ├── WorkerDied          the worker that held the request died
        │   └── DeviceLost      so did its device: this process cannot use it any more
        └── ShuttingDown        the pool refuses new work

Wrong argument types and values stay TypeError and ValueError and are raised at the call; everything
here arrives through the stream or, for models, from `get`. A foreign exception is the `__cause__`.
"""


class LlavaError(Exception):
    """Base of every error; `retryable` says whether the same call may succeed later."""

    retryable: bool = False


class ModelError(LlavaError):
    """The model cannot be found, read or run."""


class UnknownModel(ModelError):
    """No model of that name is registered, and it is no directory."""


class WeightsError(ModelError):
    """A checkpoint's files or tensors are not what its configuration promises."""


class UnsupportedModel(ModelError):
    """The configuration asks for something that this engine does not implement."""


class KernelsNotBuilt(ModelError):
    """The model is to run on CUDA and the compiled library is missing."""


class ImageError(LlavaError):
    """The picture could not be had."""


class ImageFetchError(ImageError):
    """The URL did not give a picture."""


class BlockedAddress(ImageFetchError):
    """The URL, or a redirect of it, leads where the engine may not go."""


class FetchFailed(ImageFetchError):
    """The server answered with an error, or the connection failed."""

    retryable = True


class FetchTimeout(ImageFetchError):
    """The fetch was not done by its deadline."""

    retryable = True


class ImageTooLarge(ImageError):
    """The picture has more bytes or pixels than the limits allow."""


class ImageDecodeError(ImageError):
    """The bytes are not a picture of a supported format, or a broken one."""


class RequestError(LlavaError):
    """This request cannot be answered."""


class PromptTooLong(RequestError):
    """Picture, query and answer do not fit the model's context."""


class InvalidQuery(RequestError):
    """The query holds text that cannot be encoded, such as NUL or a lone surrogate."""


class RequestTimeout(RequestError):
    """The request's deadline passed before its last token."""

    retryable = True


class RequestCancelled(RequestError):
    """The caller cancelled the stream and then asked for its whole text."""


class RequestFailed(RequestError):
    """Something unexpected failed while this request ran; the cause is attached."""


class PoolError(LlavaError):
    """The pool cannot serve the request now."""

    retryable = True


class MemoryExhausted(PoolError):
    """Neither another worker nor this request fits the memory limits."""


class SpawnFailed(PoolError):
    """A worker could not load its model; the cause is attached.

    `retryable` unless the cause is known to stay, such as a progress callback that raises.
    """


class NoWorkers(PoolError):
    """The model has no live worker."""


class PoolOverloaded(PoolError):
    """The model's queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CircuitOpen(PoolError):
    """The model failed too often in a row; what it failed with last is attached as the cause.

    `retry_after` is in seconds. `retryable` unless that failure will not go away by itself, such as
    a broken checkpoint; after `retry_after` the model is tried all the same.
    """

    def __init__(self, message: str, retry_after: float = 60.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerDied(PoolError):
    """The worker that held this request died before it was done."""


class DeviceLost(WorkerDied):
    """The device reported an error that no process recovers from; the cause is attached.

    `retryable` while the model may run on another device; only a new process has this one again.
    """


class ShuttingDown(PoolError):
    """The pool is closed or closing."""

    retryable = False
