"""CUDA kernels on the CPU: each thread a fibre, so that the same source runs where there is no GPU."""
