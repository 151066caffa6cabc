"""The tests of the decoder's pieces, on a GPU."""

from ..kernels.test_cuda_decoder import *  # noqa: F403
