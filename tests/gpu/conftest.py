"""What every GPU test may ask for."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator("cuda")
    generator.seed()  # fresh inputs every time; the seed is in the failure's report
    print("seed", generator.initial_seed())
    return generator
