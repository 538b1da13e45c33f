"""Settings for all tests."""

import torch

# The tests' models are tiny: more threads bring nothing, and on a busy machine cost tenfold, since
# each parallel region waits for the thread that was not scheduled.
torch.set_num_threads(1)
