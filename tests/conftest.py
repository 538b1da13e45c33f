"""Settings for all tests."""

import torch
from hypothesis import settings

# The tests' models are tiny: more threads bring nothing, and on a busy machine cost tenfold, since
# each parallel region waits for the thread that was not scheduled.
torch.set_num_threads(1)

# The same examples on every run, so that a failure in CI is one on every machine; and no deadline
# per example, which a busy machine would break.
settings.register_profile("llava", derandomize=True, deadline=None)
settings.load_profile("llava")
