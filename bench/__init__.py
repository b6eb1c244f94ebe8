"""Benchmarks: ``python -m bench.mask``, ``python -m bench.prefill`` and ``pytest bench``."""
