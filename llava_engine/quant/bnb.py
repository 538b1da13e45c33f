"""bitsandbytes, whose formats nf4 and int8 are: what quantises 16-bit weights to them.

Only quantising needs the package. Weights that are quantised already are read and multiplied
without it.

On a GPU 0.50 quantises to 4 bits on the device's default stream, whichever is the current one: so
that one must be, as it is where models are loaded.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from llava_engine.errors import KernelsNotBuilt


def functional(quantization: str) -> Any:
    """bitsandbytes.functional. Raises KernelsNotBuilt where the package is not usable."""
    wanted = f'EngineConfig(quantization="{quantization}")'
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.addFilter(_of_interest)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ModuleNotFoundError as error:
        raise KernelsNotBuilt(
            f"{wanted} quantises with the bitsandbytes package, which is not installed; install it "
            '(pip install "llava-engine[quant]"), load a checkpoint that was saved quantised, or '
            'choose quantization="fp8"'
        ) from error
    except Exception as error:
        raise KernelsNotBuilt(
            f"{wanted} quantises with the bitsandbytes package, and the installed one cannot be "
            f'loaded into torch {torch.__version__}; install it again (pip install "'
            'llava-engine[quant]")'
        ) from error
    finally:
        log.removeFilter(_of_interest)


def _of_interest(record: logging.LogRecord) -> bool:
    """Not that a CPU's kernel for multiplying is missing: here bitsandbytes only quantises."""
    return "gemm_4bit_forward" not in record.getMessage()
