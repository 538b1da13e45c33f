"""The models that `get` knows by name: frozen records, and the one table of them.

Standard library only; nothing here reads a checkpoint or knows of the pool.
"""

from __future__ import annotations

import difflib
import threading
from dataclasses import dataclass
from pathlib import Path

from llava_engine.errors import UnknownModel

LLAVA_15_TEMPLATE = "USER: <image>\n{query} ASSISTANT:"
"""The prompt of the published LLaVA-1.5 checkpoints."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedEstimate:
    """What a model takes in a format of EngineConfig(quantization=...).

    memory_allocation_mb, worker_share_mb: as est_memory_allocation_mb and est_worker_share_mb.
    """

    quantization: str
    memory_allocation_mb: int
    worker_share_mb: int

    def __post_init__(self) -> None:
        if not 0 < self.worker_share_mb <= self.memory_allocation_mb:
            raise ValueError("worker_share_mb must be in (0, memory_allocation_mb]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a model before it is loaded.

    registry_key: the name for `get`.
    repo_id, revision: where the hub has it; revision is a branch, tag or commit.
    directory: a local checkpoint; then repo_id and revision are not used.
    est_memory_allocation_mb: device memory of a first worker in MiB: weights in 16 bits, its KV
        share, workspace.
    est_worker_share_mb: the part of it that a further worker on the same device needs (KV share and
        workspace); None when nothing is shared.
    est_quantised: the same two in other formats; those that are left out are derived.
    est_host_memory_mb: host memory of a worker that runs on a GPU, in MiB.
    image_size: side of the vision tower's square input in pixels.
    image_mean, image_std: normalisation per channel, of values in 0..1.
    prompt_template: holds `<image>` once and `{query}` once, in this order.
    default_temperature, max_output_tokens: used where a request says nothing.
    """

    registry_key: str
    repo_id: str | None = None
    revision: str = "main"
    directory: Path | None = None
    est_memory_allocation_mb: int
    est_worker_share_mb: int | None = None
    est_quantised: tuple[QuantisedEstimate, ...] = ()
    est_host_memory_mb: int = 1024
    image_size: int = 336
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    prompt_template: str = LLAVA_15_TEMPLATE
    default_temperature: float = 0.0
    max_output_tokens: int = 512

    def __post_init__(self) -> None:
        if not self.registry_key:
            raise ValueError("registry_key must not be empty")
        if (self.repo_id is None) == (self.directory is None):
            raise ValueError("a ModelInfo has either a repo_id or a directory")
        if self.est_memory_allocation_mb <= 0:
            raise ValueError("est_memory_allocation_mb must be above 0")
        share = self.est_worker_share_mb
        if share is not None and not 0 < share <= self.est_memory_allocation_mb:
            raise ValueError("est_worker_share_mb must be in (0, est_memory_allocation_mb]")
        before, image, after = self.prompt_template.partition("<image>")
        if not image or "<image>" in after or "{query}" in before or after.count("{query}") != 1:
            raise ValueError("prompt_template must hold <image> once and then {query} once")


def _estimates(
    *, nf4: tuple[int, int], eight_bits: tuple[int, int]
) -> tuple[QuantisedEstimate, ...]:
    """Who quantises has little room: shares of the KV cache are small, so that there are two."""
    return tuple(
        QuantisedEstimate(quantization=name, memory_allocation_mb=first, worker_share_mb=share)
        for name, (first, share) in (("nf4", nf4), ("int8", eight_bits), ("fp8", eight_bits))
    )


_lock = threading.Lock()
_models: dict[str, ModelInfo] = {}


def register(info: ModelInfo) -> None:
    """Make a model known under `info.registry_key`.

    Registering the same record again does nothing; another record under a known name raises
    ValueError, since requests may already run under it.
    """
    with _lock:
        known = _models.setdefault(info.registry_key, info)
    if known != info:
        raise ValueError(f"another model is registered as {info.registry_key!r}")


def models() -> tuple[ModelInfo, ...]:
    """Every registered model, by name."""
    with _lock:
        return tuple(sorted(_models.values(), key=lambda info: info.registry_key))


def lookup(name: str) -> ModelInfo:
    """The record of a registered name. Raises UnknownModel naming the known and the nearest."""
    with _lock:
        info = _models.get(name)
        known = sorted(_models)
    if info is not None:
        return info
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UnknownModel(
        f"No model is named {name!r}, and it is no directory.{hint} Known: {', '.join(known)}."
    )


register(
    ModelInfo(
        registry_key="llava-tiny",
        directory=Path(__file__).parent / "demo" / "llava-tiny",
        est_memory_allocation_mb=256,
        est_worker_share_mb=128,
        est_host_memory_mb=256,
        image_size=112,
        max_output_tokens=96,
    )
)
register(
    ModelInfo(
        registry_key="llava-1.5-7b",
        repo_id="llava-hf/llava-1.5-7b-hf",
        est_memory_allocation_mb=20_480,
        est_worker_share_mb=6_144,
        est_quantised=_estimates(nf4=(5_504, 1_024), eight_bits=(10_176, 2_560)),
        est_host_memory_mb=3_072,
    )
)
register(
    ModelInfo(
        registry_key="llava-1.5-13b",
        repo_id="llava-hf/llava-1.5-13b-hf",
        est_memory_allocation_mb=34_816,
        est_worker_share_mb=8_192,
        est_quantised=_estimates(nf4=(9_390, 1_600), eight_bits=(16_640, 2_944)),
        est_host_memory_mb=3_072,
    )
)
