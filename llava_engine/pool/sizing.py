"""How much memory there is, and how many workers fit into it.

The probes read NVML and the host (cgroup limit included); `plan_workers` is pure arithmetic over
what they say. Megabytes are MiB throughout.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from llava_engine.config import EngineConfig
from llava_engine.registry import ModelInfo

logger = logging.getLogger(__name__)

HOST = "cpu"
_LEFT = 8
"""An eighth of the weights is not quantised: embedding, head, vision tower, projector."""
_BITS = {"nf4": 4.25, "int8": 8.1, "fp8": 8.1}
"""Of a weight, its part of the scales included."""
_LESS_SHARE = {"nf4": 4, "int8": 2, "fp8": 2}
"""Who quantises has little room: a worker's share is divided by it where no record has one."""
_LEAST_SHARE_MB = 128
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device ("cuda:N", or "cpu" for the host): all of it, and what is free now."""

    name: str
    total_mb: int
    free_mb: int


class MemoryProbe(Protocol):
    """Where the pool learns how much memory there is; tests bring their own."""

    def gpus(self) -> list[DeviceMemory]:
        """The GPUs that torch can use, none on a machine without."""

    def host(self) -> DeviceMemory:
        """The host's RAM, as far as this process may use it."""


@dataclass(frozen=True, slots=True)
class Need:
    """What the workers of a model take.

    first_mb: device memory of the first worker on a device. next_mb: of a further one there, which
    shares the weights. host_mb: host memory beside each device other than the host.
    """

    first_mb: int
    next_mb: int
    host_mb: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """What the pool holds on a device: in all, and how much of it is reserved but not yet in use,
    so that the device still counts it as free."""

    total_mb: int = 0
    pending_mb: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker that fits: its device, and what to reserve there and on the host."""

    device: str
    device_mb: int
    host_mb: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers that fit; and, for the message when none does, what was needed and available."""

    placements: tuple[Placement, ...]
    needed_mb: int
    available_mb: int


def plan_workers(
    need: Need,
    devices: list[DeviceMemory],
    host: DeviceMemory,
    held: Mapping[str, Held],
    *,
    fraction: float,
    wanted: int,
    present: frozenset[str] = frozenset(),
) -> Plan:
    """Place up to `wanted` workers on `devices`.

    A device has room for min(fraction * total - held, free now - pending). The first worker goes
    where most room is, and so does each further one; on a device that has the model already
    (`present`, or by this plan) it costs next_mb, elsewhere first_mb.
    """
    room = {device.name: _room(device, held, fraction) for device in devices}
    host_room = room.get(host.name, _room(host, held, fraction))
    has_model = set(present)
    placements: list[Placement] = []
    for _ in range(wanted):
        placed = False
        for name in sorted(room, key=lambda name: -room[name]):
            cost = need.next_mb if name in has_model else need.first_mb
            host_cost = 0 if name == host.name or name in has_model else need.host_mb
            if cost <= room[name] and host_cost <= host_room:
                room[name] -= cost
                host_room -= host_cost
                has_model.add(name)
                placements.append(Placement(name, cost, host_cost))
                placed = True
                break
        if not placed:
            break
    if placements:
        return Plan(tuple(placements), need.first_mb, 0)
    most = max(room.values(), default=0)
    if devices and need.first_mb <= most:
        return Plan((), need.host_mb, max(0, host_room))
    return Plan((), need.first_mb, max(0, most))


def _room(device: DeviceMemory, held: Mapping[str, Held], fraction: float) -> int:
    mine = held.get(device.name, Held())
    return min(int(device.total_mb * fraction) - mine.total_mb, device.free_mb - mine.pending_mb)


def estimate_need(info: ModelInfo, config: EngineConfig, device: str) -> Need:
    """What a model's workers take on `device` under `config`.

    The record's estimates are for 16 bits, and what is not quantised takes twice that in 32, the
    CPU's default. On top come the weights' copies in 8 bits for prefill="fp8", with the weights,
    and the pixels that are kept, once, in the host's memory.
    """
    scale = _scale(config, device)
    share = scale * _share_estimate_mb(info, config.quantization)
    kv = share * 3 // 4
    more = 0 if config.kv_cache_mb is None else config.kv_cache_mb - kv
    first = max(1, _weights_estimate_mb(info, config, scale) + share + more)
    following = first if info.est_worker_share_mb is None else max(1, share + more)
    if device == HOST:
        return Need(first + config.pixel_cache_mb, following, 0)
    return Need(first, following, info.est_host_memory_mb + config.pixel_cache_mb)


def kv_share_mb(info: ModelInfo, config: EngineConfig, device: str) -> int:
    """The KV cache that one worker brings, out of what `estimate_need` says."""
    if config.kv_cache_mb is not None:
        return config.kv_cache_mb
    share = _share_estimate_mb(info, config.quantization) * _scale(config, device)
    return max(1, share * 3 // 4)  # the rest is workspace


def formats_needed(info: ModelInfo, config: EngineConfig, device: str) -> dict[str, Need]:
    """What the model's workers would take in each format that is smaller, the largest first."""
    smaller: dict[str | None, tuple[Literal["int8", "fp8", "nf4"], ...]]
    smaller = {None: ("int8", "fp8", "nf4"), "int8": ("nf4",), "fp8": ("nf4",), "nf4": ()}
    return {
        name: estimate_need(info, replace(config, quantization=name), device)
        for name in smaller[config.quantization]
        if config.prefill != "fp8" or name == "fp8"
    }


def _share_estimate_mb(info: ModelInfo, quantization: str | None) -> int:
    """A worker's KV cache and workspace, in 16 bits."""
    for estimate in info.est_quantised:
        if estimate.quantization == quantization:
            return estimate.worker_share_mb
    whole = info.est_worker_share_mb or info.est_memory_allocation_mb // 4
    if quantization is None:
        return whole
    return min(whole, max(_LEAST_SHARE_MB, whole // _LESS_SHARE[quantization]))


def _weights_estimate_mb(info: ModelInfo, config: EngineConfig, scale: int) -> int:
    """The weights and their copies. scale: 2 for 32 bits."""
    whole = info.est_memory_allocation_mb - _share_estimate_mb(info, None)
    if config.quantization is None:
        return scale * whole + (whole // 2 if config.prefill == "fp8" else 0)
    left = whole // _LEFT
    for estimate in info.est_quantised:
        if estimate.quantization == config.quantization:
            weights = estimate.memory_allocation_mb - estimate.worker_share_mb
            return weights + (scale - 1) * left
    return int((whole - left) * _BITS[config.quantization] / 16) + scale * left


def _scale(config: EngineConfig, device: str) -> int:
    wide = config.dtype == "float32" or (config.dtype == "auto" and device == HOST)
    return 2 if wide else 1


class SystemProbe:
    """The machine's own figures.

    nvml: the pynvml module, or None to import it when it is first needed.
    """

    def __init__(self, nvml: Any = None, cgroup_root: Path = Path("/sys/fs/cgroup")) -> None:
        self._nvml = nvml
        self._cgroup_root = cgroup_root
        self._warned = False

    def gpus(self) -> list[DeviceMemory]:
        """Per device NVML's figures, or the CUDA runtime's where NVML fails."""
        import torch

        if not torch.cuda.is_available():
            return []
        found = []
        for index in range(torch.cuda.device_count()):
            memory = self._nvml_memory(str(torch.cuda.get_device_properties(index).uuid))
            if memory is None:
                try:
                    free, total = torch.cuda.mem_get_info(index)
                except RuntimeError:  # the device has failed: it is there, but has no room
                    free, total = 0, 0
                memory = (total, free)
            found.append(DeviceMemory(f"cuda:{index}", memory[0] // _MIB, memory[1] // _MIB))
        return found

    def _nvml_memory(self, uuid: str) -> tuple[int, int] | None:
        """Total and free bytes of the GPU; None where NVML is missing or fails."""
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            nvml = self._nvml
            nvml.nvmlInit()
            try:
                # torch's index follows CUDA_VISIBLE_DEVICES and NVML's does not: go by UUID.
                handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                return int(memory.total), int(memory.free)
            finally:
                nvml.nvmlShutdown()
        except Exception as error:  # NVMLError is made by the module that may be missing
            if not self._warned:
                self._warned = True
                logger.warning("NVML does not answer (%s); asking CUDA.", type(error).__name__)
            return None

    def host(self) -> DeviceMemory:
        """RAM, bounded by every cgroup limit above this process."""
        import psutil

        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
        for limit, used in cgroup_limits(self._cgroup_root, Path("/proc/self/cgroup")):
            total = min(total, limit)
            free = min(free, max(0, limit - used))
        return DeviceMemory(HOST, total // _MIB, free // _MIB)


def cgroup_limits(root: Path, membership: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup that holds this process, v2 or v1; unlimited ones are
    left out. File cache that the kernel would give back first does not count as used.

    Files: memory.max, memory.current, memory.stat of Documentation/admin-guide/cgroup-v2; for v1
    memory.limit_in_bytes and memory.usage_in_bytes.
    """
    found = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root if not controllers else root / "memory"
        names = (
            ("memory.max", "memory.current", "inactive_file")
            if not controllers
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        # Inside a container the path may be the host's; then the root is the container's own.
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            limit = _read(folder / names[0]).strip()
            if limit.isdigit() and int(limit) < 1 << 60:
                used = int(_read(folder / names[1]).strip() or 0)
                found.append((int(limit), max(0, used - _stat(folder, names[2]))))
            if folder == base:
                break
    return found


def _stat(folder: Path, name: str) -> int:
    for line in _read(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class Ledger:
    """What the pool holds on each device, by owner. Not thread-safe.

    An entry is pending while its memory is promised and not yet taken. An owner has its own device
    and, where that is a GPU, memory of the host beside it.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Placement, bool]] = {}

    def reserve(self, owner: Hashable, placement: Placement) -> None:
        """Promise `owner` what it needs."""
        self._entries[owner] = placement, True

    def measure(self, owner: Hashable, placement: Placement) -> None:
        """`owner` has taken its memory, and so much it was."""
        self._entries[owner] = placement, False

    def release(self, owner: Hashable) -> None:
        """`owner` holds nothing any more."""
        self._entries.pop(owner, None)

    def host_mb(self, owner: Hashable) -> int:
        """Host memory that `owner` has beside its device's."""
        entry = self._entries.get(owner)
        return entry[0].host_mb if entry is not None else 0

    def held(self) -> dict[str, Held]:
        """Per device; a device of which nothing is held is left out."""
        total: Counter[str] = Counter()
        pending: Counter[str] = Counter()
        for placement, is_pending in self._entries.values():
            for name, size in (
                (placement.device, placement.device_mb),
                (HOST, placement.host_mb),
            ):
                total[name] += size
                pending[name] += size if is_pending else 0
        return {name: Held(total[name], pending[name]) for name in total if total[name]}

    def total_mb(self) -> int:
        """On the devices that models run on; host memory beside a GPU is not in it."""
        return sum(placement.device_mb for placement, _ in self._entries.values())
