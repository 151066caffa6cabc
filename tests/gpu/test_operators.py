"""The tests of the LoRA operators, on a GPU."""

from ..kernels.test_cuda import *  # noqa: F403
