"""The op namespace `llava_engine`: how a kernel file declares an op, and what runs on a call.

An op writes into tensors that the caller gives and returns nothing. On the CPU its plain-torch
reference runs. On CUDA the compiled library does, loaded when CUDA is first used; where it is
missing the call raises. Inside `references()` the reference runs everywhere.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

from llava_engine.errors import KernelsNotBuilt

NAMESPACE = "llava_engine"
LIBRARY = Path(__file__).parent.parent / "_kernels.so"

_HOW = 'choose EngineConfig(kernels="reference") to run the slow references'
# cudaError_t, which torch has no names for.
_DRIVER_TOO_OLD = 35
_NO_CODE_FOR_THIS_GPU = 209

# torch.library.Library has no type annotations; this and the two calls below are all we use of it.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_names: list[str] = []
_loading = threading.Lock()
_loaded = False
_use_references = ContextVar("use_references", default=False)


@contextmanager
def references() -> Iterator[None]:
    """Run every op by its torch reference in this block, also where the compiled library is loaded.

    It holds for the thread that enters it (a context variable), so that two models in one process
    can differ. For EngineConfig(kernels="reference").
    """
    token = _use_references.set(True)
    try:
        yield
    finally:
        _use_references.reset(token)


def using_references() -> bool:
    """Whether this thread is inside `references()`."""
    return _use_references.get()


@contextmanager
def programmatic_launch(on: bool) -> Iterator[None]:
    """While a step is captured in this block, let its kernels start before their predecessors end.

    It holds for the calling thread (CUDA's programmatic dependent launch, on GPUs from Hopper on).
    """
    if not on or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        yield
        return
    _load()
    library = _quick_functions()
    before = library.llava_engine_programmatic_launch(1)
    try:
        yield
    finally:
        library.llava_engine_programmatic_launch(before)


def c_library() -> ctypes.CDLL:
    """The compiled library's C functions; calling one gives up the GIL. Raises KernelsNotBuilt."""
    _load()
    return _c_functions()


@cache
def _c_functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARY))


@cache
def _quick_functions() -> ctypes.PyDLL:
    """The same for what takes less time than giving up the GIL, and maybe waiting for it."""
    return ctypes.PyDLL(str(LIBRARY))


def require_kernels(device: torch.device) -> None:
    """Raise KernelsNotBuilt unless every op that is declared has a kernel that runs on `device`.

    On the CPU the references are the kernels. On CUDA this loads the library. It is for
    EngineConfig(kernels="auto"); who chose "reference" does not ask.
    """
    if device.type == "cpu":
        return
    if device.type == "cuda":
        _load()
        _probe(device)
    key = device.type.upper()
    lacking = [
        name
        for name in _names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    ]
    if lacking:
        raise KernelsNotBuilt(
            f"no compiled {key} kernel for {', '.join(lacking)}: the library is older than the "
            f"package; build it again with nvcc (python setup.py build_csrc), or {_HOW}"
        )


def define(schema: str, reference: Callable[..., None]) -> Callable[..., None]:
    """Declare the op of `schema` and return what calls it.

    schema: "name(Tensor(a!) out, ...) -> ()" as torch.library has it.
    """
    name = schema.partition("(")[0]
    _names.append(name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    # The reference stands under the default key, so that it serves every device but those that the
    # compiled library registers for.
    _library.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(out: torch.Tensor, *arguments: object) -> None:
        if _use_references.get():
            reference(out, *arguments)
            return
        if not _loaded and out.is_cuda:
            _load()  # or the dispatcher would quietly take the reference
        op(out, *arguments)

    return call


def hold(tensors: Iterable[torch.Tensor]) -> object:
    """What has torch's C++ refer to tensors while it is there: to those that go to an op often.

    An op drops its arguments while Python's lock is given up. Where nothing else in C++ refers to a
    tensor, torch takes the lock for that (pytorch#167564): in a call with all weights of a decoder
    267 times, and beside threads that compute it waits for it again and again.
    """
    return torch._C.ScriptList(list(tensors))


def _fake(*args: object, **kwargs: object) -> None:
    """Every op returns nothing and changes no shape, so one fake serves all."""


def _load() -> None:
    """Load the compiled library, once per process."""
    global _loaded
    with _loading:
        if _loaded:
            return
        if not LIBRARY.exists():
            raise KernelsNotBuilt(
                "the package's CUDA library is not there; build it with nvcc (python setup.py "
                f"build_csrc), or {_HOW}"
            )
        try:
            torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise KernelsNotBuilt(
                f"the package's CUDA library cannot be loaded into torch {torch.__version__}; "
                f"build it again (python setup.py build_csrc), or {_HOW}"
            ) from error
        _loaded = True


@cache  # a device that could run it once is not asked again: by then it may have failed
def _probe(device: torch.device) -> None:
    """Ask the library itself whether its code runs on `device`."""
    library = ctypes.CDLL(str(LIBRARY))
    library.llava_engine_architectures.restype = ctypes.c_char_p
    library.llava_engine_error_text.restype = ctypes.c_char_p
    index = device.index if device.index is not None else 0
    error = library.llava_engine_probe(index)
    if error == 0:
        return
    text = library.llava_engine_error_text(error).decode()
    if error == _NO_CODE_FOR_THIS_GPU:
        built = library.llava_engine_architectures().decode()
        raise KernelsNotBuilt(
            f"the package's CUDA library has no code for {device}: it is built for {built}; build "
            f"it for this GPU (LLAVA_CUDA_ARCHS), or {_HOW}"
        )
    if error == _DRIVER_TOO_OLD:
        raise KernelsNotBuilt(
            f"the driver of {device} is too old for the package's CUDA library: {text}"
        )
    raise KernelsNotBuilt(f"the package's CUDA library does not run on {device}: {text}")
