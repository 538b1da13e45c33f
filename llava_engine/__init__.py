"""llava_engine: describe pictures with LLaVA models, inside your process.

    import llava_engine

    model = llava_engine.get("llava-tiny")
    for chunk in model.describe_image("picture.jpg", "What is in the picture?"):
        print(chunk, end="")

Importing the package imports neither torch nor an HTTP client; the first request does.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from llava_engine.config import EngineConfig, PoolConfig
from llava_engine.errors import (
    BlockedAddress,
    CircuitOpen,
    DeviceLost,
    FetchFailed,
    FetchTimeout,
    ImageDecodeError,
    ImageError,
    ImageFetchError,
    ImageTooLarge,
    InvalidQuery,
    KernelsNotBuilt,
    LlavaError,
    MemoryExhausted,
    ModelError,
    NoWorkers,
    PoolError,
    PoolOverloaded,
    PromptTooLong,
    RequestCancelled,
    RequestError,
    RequestFailed,
    RequestTimeout,
    ShuttingDown,
    SpawnFailed,
    UnknownModel,
    UnsupportedModel,
    WeightsError,
    WorkerDied,
)
from llava_engine.registry import ModelInfo, QuantisedEstimate, models, register
from llava_engine.types import (
    Chunk,
    FinishReason,
    ImageInput,
    SamplingParams,
    Timings,
    Usage,
)

if TYPE_CHECKING:
    from llava_engine.pool.pool import WorkerPool, vision_pool
    from llava_engine.stream import ChunkStream
    from llava_engine.vision_model import VisionModel, get

__version__ = "0.1.0"

# Where the application configures no logging, logging prints warnings on stderr by itself.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "BlockedAddress",
    "Chunk",
    "ChunkStream",
    "CircuitOpen",
    "DeviceLost",
    "EngineConfig",
    "FetchFailed",
    "FetchTimeout",
    "FinishReason",
    "ImageDecodeError",
    "ImageError",
    "ImageFetchError",
    "ImageInput",
    "ImageTooLarge",
    "InvalidQuery",
    "KernelsNotBuilt",
    "LlavaError",
    "MemoryExhausted",
    "ModelError",
    "ModelInfo",
    "NoWorkers",
    "PoolConfig",
    "PoolError",
    "PoolOverloaded",
    "PromptTooLong",
    "QuantisedEstimate",
    "RequestCancelled",
    "RequestError",
    "RequestFailed",
    "RequestTimeout",
    "SamplingParams",
    "ShuttingDown",
    "SpawnFailed",
    "Timings",
    "UnknownModel",
    "UnsupportedModel",
    "Usage",
    "VisionModel",
    "WeightsError",
    "WorkerDied",
    "WorkerPool",
    "__version__",
    "get",
    "models",
    "register",
    "vision_pool",
]

_LAZY = {
    "ChunkStream": "llava_engine.stream",
    "VisionModel": "llava_engine.vision_model",
    "WorkerPool": "llava_engine.pool.pool",
    "get": "llava_engine.vision_model",
    "vision_pool": "llava_engine.pool.pool",
}


def __getattr__(name: str) -> Any:
    """Import the names that lead to torch only when they are asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
