"""How much fits where: the plan over every kind of machine, the probes, the ledger."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_engine import EngineConfig
from llava_engine.pool.sizing import (
    DeviceMemory,
    Held,
    Ledger,
    Need,
    Placement,
    SystemProbe,
    cgroup_limits,
    estimate_need,
    formats_needed,
    kv_share_mb,
    plan_workers,
)
from llava_engine.registry import lookup

GB = 1024
BIG_HOST = DeviceMemory("cpu", 256 * GB, 256 * GB)
SEVEN = Need(20 * GB, 6 * GB, 3 * GB)  # LLaVA-1.5-7B's record
ALONE = Need(20 * GB, 20 * GB, 3 * GB)  # the same with nothing shared


def gpu(index: int, total_gb: int, free_gb: int | None = None) -> DeviceMemory:
    return DeviceMemory(
        f"cuda:{index}", total_gb * GB, (total_gb if free_gb is None else free_gb) * GB
    )


def devices_of(need: Need, *devices: DeviceMemory, **options: object) -> list[str]:
    options = {"fraction": 0.8, "wanted": 2, "held": {}, "host": BIG_HOST} | options
    return [p.device for p in plan_workers(need, list(devices), **options).placements]


@pytest.mark.parametrize(
    ("total", "shared", "alone"),
    [(24, 0, 0), (26, 1, 1), (40, 2, 1), (49, 2, 1), (50, 2, 2), (80, 2, 2)],
)
def test_two_workers_one_or_none_on_one_gpu(total: int, shared: int, alone: int) -> None:
    # 80 % of it holds 20 GB + 6 GB, or 2 * 20 GB with nothing shared; one takes 20 GB in each case.
    assert len(devices_of(SEVEN, gpu(0, total))) == shared
    assert len(devices_of(ALONE, gpu(0, total))) == alone


def test_the_limit_itself_still_fits_and_one_less_does_not() -> None:
    for total, count in ((2500, 2), (2499, 1), (1250, 1), (1249, 0)):
        device = DeviceMemory("cuda:0", total, total)
        assert len(devices_of(Need(1000, 1000), device)) == count


def test_what_the_pool_holds_counts_against_the_limit_whatever_is_free() -> None:
    device = gpu(0, 80)
    held = {"cuda:0": Held(40 * GB, 0)}
    assert devices_of(SEVEN, device, held=held) == ["cuda:0"]
    assert devices_of(SEVEN, device, held={"cuda:0": Held(45 * GB, 0)}) == []


def test_what_others_use_counts_and_so_does_what_is_promised() -> None:
    assert devices_of(SEVEN, gpu(0, 80, free_gb=10)) == []
    assert devices_of(SEVEN, gpu(0, 80, free_gb=25)) == ["cuda:0"]
    pending = {"cuda:0": Held(6 * GB, 6 * GB)}
    assert devices_of(SEVEN, gpu(0, 80, free_gb=25), held=pending) == []


def test_four_gpus_take_the_second_worker_where_most_room_is() -> None:
    gpus = [gpu(0, 80, 30), gpu(1, 80, 60), gpu(2, 80, 50), gpu(3, 80, 5)]
    assert devices_of(SEVEN, *gpus) == ["cuda:1", "cuda:2"]
    assert devices_of(SEVEN, *gpus, wanted=4) == ["cuda:1", "cuda:2", "cuda:1", "cuda:1"]


def test_a_gpu_that_has_the_model_takes_the_next_worker_for_its_share() -> None:
    small = gpu(0, 80, free_gb=8)
    assert devices_of(SEVEN, small) == []
    assert devices_of(SEVEN, small, present=frozenset({"cuda:0"})) == ["cuda:0"]


def test_host_memory_is_needed_beside_each_gpu_once() -> None:
    gpus = [gpu(0, 80), gpu(1, 80)]
    four = DeviceMemory("cpu", 4 * GB, 4 * GB)
    plan = plan_workers(SEVEN, gpus, four, {}, fraction=0.8, wanted=2)
    # 3.2 GB of the host: for one GPU, and so the second worker shares it.
    assert [p.device for p in plan.placements] == ["cuda:0", "cuda:0"]
    assert [p.host_mb for p in plan.placements] == [3 * GB, 0]
    two = DeviceMemory("cpu", 2 * GB, 2 * GB)
    plan = plan_workers(SEVEN, gpus, two, {}, fraction=0.8, wanted=2)
    assert (plan.placements, plan.needed_mb, plan.available_mb) == ((), 3 * GB, 1638)


def test_without_a_gpu_the_model_counts_against_ram() -> None:
    host = DeviceMemory("cpu", 32 * GB, 32 * GB)
    plan = plan_workers(Need(20 * GB, 2 * GB), [host], host, {}, fraction=0.8, wanted=2)
    assert [(p.device, p.device_mb, p.host_mb) for p in plan.placements] == [
        ("cpu", 20 * GB, 0),
        ("cpu", 2 * GB, 0),
    ]


def test_what_is_available_is_never_negative() -> None:
    plan = plan_workers(
        SEVEN, [gpu(0, 24, 1)], BIG_HOST, {"cuda:0": Held(30 * GB, 30 * GB)}, fraction=0.8, wanted=2
    )
    assert (plan.placements, plan.needed_mb, plan.available_mb) == ((), 20 * GB, 0)


sizes = st.integers(1, 100_000)
machines = st.lists(st.tuples(sizes, st.integers(0, 100)), min_size=0, max_size=4)


@given(
    machines,
    sizes,
    sizes,
    st.integers(0, 5000),
    sizes,
    st.integers(1, 6),
    st.lists(st.integers(0, 100_000), min_size=5, max_size=5),
)
def test_no_plan_exceeds_a_limit(
    machine: list[tuple[int, int]],
    first: int,
    share: int,
    host_mb: int,
    host_total: int,
    wanted: int,
    holding: list[int],
) -> None:
    gpus = [
        DeviceMemory(f"cuda:{i}", total, total * percent // 100)
        for i, (total, percent) in enumerate(machine)
    ]
    host = DeviceMemory("cpu", host_total, host_total)
    held = {device.name: Held(mb, mb) for device, mb in zip([*gpus, host], holding, strict=False)}
    need = Need(first, min(first, share), host_mb)
    plan = plan_workers(need, gpus or [host], host, held, fraction=0.8, wanted=wanted)
    assert plan.available_mb >= 0 and len(plan.placements) <= wanted
    for device in (*gpus, host):
        new = sum(p.device_mb for p in plan.placements if p.device == device.name)
        new += sum(p.host_mb for p in plan.placements) if device is host else 0
        if new:
            assert held[device.name].total_mb + new <= device.total_mb * 0.8
            assert held[device.name].pending_mb + new <= device.free_mb


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two CUDA devices as torch would show them, the second of which NVML lists first."""
    uuids = ["aaaa", "bbbb"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index])
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 << 30, (4 + index) << 30))
    return uuids


class Nvml:
    """The functions of pynvml that are used, over a table of memory by UUID."""

    def __init__(self, memory: dict[str, tuple[int, int]], fail_at: str = "") -> None:
        self.memory = memory
        self.fail_at = fail_at
        self.open = 0

    def _fail(self, name: str) -> None:
        if name == self.fail_at:
            raise RuntimeError("NVML: Driver/library version mismatch")

    def nvmlInit(self) -> None:  # noqa: N802
        self._fail("init")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self._fail("handle")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self._fail("memory")
        total, free = self.memory[handle]
        return SimpleNamespace(total=total, free=free)


def test_nvml_says_how_much_each_of_torchs_gpus_has(cards: list[str]) -> None:
    nvml = Nvml({"GPU-bbbb": (80 << 30, 70 << 30), "GPU-aaaa": (24 << 30, 1 << 30)})
    assert SystemProbe(nvml).gpus() == [
        DeviceMemory("cuda:0", 24 * GB, 1 * GB),
        DeviceMemory("cuda:1", 80 * GB, 70 * GB),
    ]
    assert nvml.open == 0


@pytest.mark.parametrize("fail_at", ["init", "handle", "memory"])
def test_where_nvml_fails_cuda_is_asked_and_the_log_says_so_once(
    cards: list[str], fail_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = Nvml({}, fail_at)
    probe = SystemProbe(nvml)
    for _ in range(2):
        assert probe.gpus() == [
            DeviceMemory("cuda:0", 4 * GB, 3 * GB),
            DeviceMemory("cuda:1", 5 * GB, 3 * GB),
        ]
    assert nvml.open == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_nvml_missing_and_no_gpu(cards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert [device.total_mb for device in SystemProbe().gpus()] == [4 * GB, 5 * GB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert SystemProbe().gpus() == []


def write(path: Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(f"{content}\n")


def test_cgroup_v2_counts_every_limit_above_and_gives_back_file_cache(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("0::/kube/pod\n")
    write(root, memory__max="max")
    write(root / "kube", memory__max=8000, memory__current=5000, memory__stat="inactive_file 1000")
    write(root / "kube/pod", memory__max=6000, memory__current=100, memory__stat="anon 7")
    assert cgroup_limits(root, membership) == [(6000, 100), (8000, 4000)]


def test_cgroup_v1_and_a_path_that_is_the_hosts(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("11:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    write(
        root / "memory",
        memory__limit_in_bytes=4096,
        memory__usage_in_bytes=4000,
        memory__stat="cache 3\ntotal_inactive_file 5000",
    )
    assert cgroup_limits(root, membership) == [(4096, 0)]
    write(root / "memory", memory__limit_in_bytes=9223372036854771712)  # v1's "unlimited"
    assert cgroup_limits(root, membership) == []
    assert cgroup_limits(tmp_path / "none", tmp_path / "none") == []


def test_the_host_has_what_psutil_says_or_the_cgroup_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SystemProbe(cgroup_root=tmp_path).host()
    assert free.total_mb == psutil.virtual_memory().total >> 20
    assert 0 < free.free_mb < free.total_mb
    monkeypatch.setattr(
        "llava_engine.pool.sizing.cgroup_limits", lambda *_: [(512 << 20, 500 << 20)]
    )
    assert SystemProbe(cgroup_root=tmp_path).host() == DeviceMemory("cpu", 512, 12)


def test_estimates_follow_the_dtype_and_the_kv_share() -> None:
    info, plain = lookup("llava-1.5-7b"), EngineConfig(pixel_cache_mb=0)
    assert estimate_need(info, plain, "cuda:0") == Need(20_480, 6_144, 3_072)
    assert estimate_need(info, plain, "cpu") == Need(40_960, 12_288, 0)
    narrow = EngineConfig(dtype="bfloat16", pixel_cache_mb=0)
    assert estimate_need(info, narrow, "cpu") == Need(20_480, 6_144, 0)
    given = EngineConfig(kv_cache_mb=1000, pixel_cache_mb=0)
    assert kv_share_mb(info, given, "cuda:0") == 1000
    kv = kv_share_mb(info, plain, "cuda:0")
    assert estimate_need(info, given, "cuda:0") == Need(20_480 - kv + 1000, 6_144 - kv + 1000, 3072)


def test_fp8_copies_come_with_the_weights() -> None:
    """One byte beside two: half of what a first worker takes more than the next."""
    info = lookup("llava-1.5-7b")
    config = EngineConfig(prefill="fp8", pixel_cache_mb=0)
    assert estimate_need(info, config, "cuda:0") == Need(20_480 + 7_168, 6_144, 3_072)
    seven_b = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # bytes of the decoder's layers in fp8
    assert seven_b / (1 << 20) < 7_168
    alone = replace(info, est_worker_share_mb=None)
    assert estimate_need(alone, config, "cuda:0") == Need(20_480 + 7_680, 20_480 + 7_680, 3_072)


LINEAR = {
    "llava-1.5-7b": (32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 7_063_427_072),
    "llava-1.5-13b": (40 * (4 * 5120 * 5120 + 3 * 5120 * 13824), 13_350_839_296),
}
"""Weights in the decoder's products, and all parameters."""


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("format", "bits"), [("nf4", 4 + 8 / 64), ("int8", 8), ("fp8", 8)])
def test_a_formats_estimate_holds_its_weights(
    format: Literal["nf4", "int8", "fp8"], bits: float, name: str
) -> None:
    """And no more than a twentieth too much."""
    products, parameters = LINEAR[name]
    size = (products * bits / 8 + (parameters - products) * 2) / (1 << 20)
    need = estimate_need(lookup(name), EngineConfig(quantization=format), "cuda:0")
    assert size < need.first_mb - need.next_mb < 1.05 * size


def test_weights_in_fp8_need_no_copies_for_prefill() -> None:
    info = lookup("llava-1.5-7b")
    one, other = (
        estimate_need(info, EngineConfig(quantization="fp8", prefill=prefill), "cuda:0")
        for prefill in ("exact", "fp8")
    )
    assert one == other


def test_formats_that_no_record_has_are_derived() -> None:
    info = replace(lookup("llava-1.5-7b"), est_quantised=())
    products, parameters = LINEAR["llava-1.5-7b"]
    whole = estimate_need(info, EngineConfig(), "cuda:0")
    for config, bits in (
        (EngineConfig(quantization="nf4"), 4),
        (EngineConfig(quantization="int8"), 8),
        (EngineConfig(quantization="fp8"), 8),
    ):
        need = estimate_need(info, config, "cuda:0")
        size = (products * bits / 8 + (parameters - products) * 2) / (1 << 20)
        assert need.next_mb == whole.next_mb // (16 // bits)
        assert size < need.first_mb - need.next_mb < 1.25 * size
    tiny = estimate_need(lookup("llava-tiny"), EngineConfig(quantization="nf4"), "cuda:0")
    assert tiny.next_mb == lookup("llava-tiny").est_worker_share_mb  # there is little to divide


def test_on_the_cpu_what_is_not_quantised_takes_32_bits() -> None:
    info, config = lookup("llava-1.5-7b"), EngineConfig(quantization="nf4", pixel_cache_mb=0)
    products, parameters = LINEAR["llava-1.5-7b"]
    size = (products / 2 + (parameters - products) * 4) / (1 << 20)
    need = estimate_need(info, config, "cpu")
    assert size < need.first_mb - need.next_mb < 1.25 * size
    assert need.next_mb == 2 * estimate_need(info, config, "cuda:0").next_mb
    assert kv_share_mb(info, config, "cpu") == need.next_mb * 3 // 4


@pytest.mark.parametrize(
    ("name", "quantization", "card_mb", "workers"),
    [
        ("llava-1.5-7b", None, 8188, 0),
        ("llava-1.5-7b", "int8", 8188, 0),
        ("llava-1.5-7b", "nf4", 8188, 2),  # as a GeForce of "8 GB" has them
        ("llava-1.5-7b", "nf4", 6144, 0),
        ("llava-1.5-7b", "int8", 16_376, 2),
        ("llava-1.5-7b", "fp8", 16_376, 2),
        ("llava-1.5-13b", "nf4", 12_282, 1),
        ("llava-1.5-13b", "nf4", 16_376, 2),
        ("llava-1.5-13b", "int8", 24_564, 2),
    ],
)
def test_workers_on_a_card_by_format(
    name: str,
    quantization: Literal["nf4", "int8", "fp8"] | None,
    card_mb: int,
    workers: int,
) -> None:
    need = estimate_need(lookup(name), EngineConfig(quantization=quantization), "cuda:0")
    card = DeviceMemory("cuda:0", card_mb, card_mb)
    assert len(devices_of(need, card)) == workers


def test_smaller_formats_are_offered_largest_first() -> None:
    info = lookup("llava-1.5-7b")

    def offered(**settings: Any) -> list[str]:
        return list(formats_needed(info, EngineConfig(**settings), "cuda:0"))

    assert offered() == ["int8", "fp8", "nf4"]
    assert offered(quantization="int8") == offered(quantization="fp8") == ["nf4"]
    assert offered(quantization="nf4") == offered(prefill="fp8", quantization="fp8") == []
    assert offered(prefill="fp8") == ["fp8"]
    needs = formats_needed(info, EngineConfig(kv_cache_mb=512), "cuda:0")
    assert needs["nf4"] == estimate_need(
        info, EngineConfig(kv_cache_mb=512, quantization="nf4"), "cuda:0"
    )


def test_kept_pixels_are_the_hosts_wherever_the_model_is() -> None:
    info, config = lookup("llava-1.5-7b"), EngineConfig(pixel_cache_mb=500)
    assert estimate_need(info, config, "cuda:0") == Need(20_480, 6_144, 3_072 + 500)
    assert estimate_need(info, config, "cpu") == Need(40_960 + 500, 12_288, 0)


def test_the_ledger_counts_by_device_and_forgets_on_release() -> None:
    ledger = Ledger()
    ledger.reserve("a", Placement("cuda:0", 100, 10))
    ledger.reserve("b", Placement("cuda:1", 50, 10))
    assert ledger.held() == {"cuda:0": Held(100, 100), "cuda:1": Held(50, 50), "cpu": Held(20, 20)}
    assert ledger.total_mb() == 150
    ledger.measure("a", Placement("cuda:0", 70, 10))
    assert ledger.held()["cuda:0"] == Held(70, 0)
    for owner in ("a", "b", "b"):
        ledger.release(owner)
    assert ledger.held() == {} and ledger.total_mb() == 0
