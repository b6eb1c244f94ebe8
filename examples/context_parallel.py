"""One prompt on several processes: ``torchrun --nproc-per-node 2 examples/context_parallel.py``.

Each process holds its own rows of q, k and v, as a model would after embedding its own tokens, and computes their
attention. With CUDA each takes a card of its own and NCCL, else the processes share the CPU and gloo. Each compares its
rows with the slow reference of the whole prompt.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # point-to-point sends need no NVLink multicast

import torch
import torch.distributed as dist

from stem_flex import StemConfig, reference
from stem_flex.distributed import balanced, context_prefill, unshard


def main(tokens: int = 1000, group: dist.ProcessGroup | None = None) -> float:
    """Returns the largest difference of this process's rows from the reference."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    config = StemConfig(block_size=64, schedule="fixed", k_start=2, sink_blocks=1, local_blocks=1)

    # Every process draws the same prompt here, for the comparison; a model's process would have its own rows only.
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, tokens, 32, generator=generator)
    k, v = (torch.randn(1, 2, tokens, 32, generator=generator) for _ in range(2))

    split = balanced(tokens, world, config)
    position_ids = split.positions(rank)  # the rows of this process, for its embedding and RoPE
    own = [split.shard(x, rank).to(device) for x in (q, k, v)]
    out = context_prefill(*own, config, split=split, group=group)
    print(f"rank {rank}: {len(position_ids)} rows of {tokens}, in ranges {split.ranges[rank]}", flush=True)

    whole = unshard(out, split, group=group)  # only where all rows are wanted
    assert torch.equal(split.shard(whole, rank), out)
    return float((out.cpu() - split.shard(reference.stem_attention(q, k, v, config), rank)).abs().max())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1000, help="length of the prompt")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("every process needs its rank: torchrun --nproc-per-node 2 examples/context_parallel.py")
    return options


if __name__ == "__main__":
    tokens = parse().tokens  # before the processes wait for each other
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    difference = main(tokens)
    dist.barrier()
    dist.destroy_process_group()
    assert difference < (1e-2 if torch.cuda.is_available() else 1e-5)  # TRITON takes float32 products in TF32
