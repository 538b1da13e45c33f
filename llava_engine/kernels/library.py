"""The op namespace `llava_engine`: how a kernel file declares an op, its reference and its fake.

An op writes into tensors that the caller gives and returns nothing. The plain-torch reference is
registered under CompositeExplicitAutograd, so it runs on every device for which the compiled
library has registered nothing closer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llava_engine.errors import KernelsNotBuilt

NAMESPACE = "llava_engine"

# torch.library.Library has no type annotations; this and the two calls below are all we use of it.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_names: list[str] = []


def require_kernels(device: torch.device) -> None:
    """Raise KernelsNotBuilt unless every op that is declared has a kernel for `device`.

    On the CPU the references are the kernels. This is for EngineConfig(kernels="auto"); who chose
    "reference" does not ask.
    """
    if device.type == "cpu":
        return
    key = device.type.upper()
    lacking = [
        name
        for name in _names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    ]
    if lacking:
        raise KernelsNotBuilt(
            f"no compiled {key} kernel for {', '.join(lacking)}; build the package with nvcc, or "
            'choose EngineConfig(kernels="reference") to run the slow references'
        )


def define(schema: str, reference: Callable[..., None]) -> Any:
    """Declare the op of `schema` and return its callable overload.

    schema: "name(Tensor(a!) out, ...) -> ()" as torch.library has it.
    """
    name = schema.partition("(")[0]
    _names.append(name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _fake(*args: object, **kwargs: object) -> None:
    """Every op returns nothing and changes no shape, so one fake serves all."""
