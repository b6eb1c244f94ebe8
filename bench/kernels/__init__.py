"""``pytest bench/kernels``: each Triton kernel alone under pytest-benchmark, one file a kernel. CUDA only."""
