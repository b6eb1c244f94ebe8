"""Past one card: context parallel prefill over `torch.distributed`. For tensor parallelism nothing is needed here.

    import torch.distributed as dist
    from stem_flex.distributed import balanced, context_prefill, unshard

    dist.init_process_group()                              # under torchrun
    split = balanced(tokens, dist.get_world_size(), config)
    rows = split.positions(dist.get_rank())                # the tokens this rank embeds, and their position_ids
    out = context_prefill(q, k, v, config, split=split)    # q, k, v of these rows; out too
    whole = unshard(out, split)                            # where all rows are wanted

Heads are independent in Stem: with heads spread over ranks each calls :func:`stem_flex.stem_attention` on its own, as
transformers' ``tp_plan="auto"`` does and DTensors sharded by heads are served.
"""

from stem_flex.distributed.exchange import unshard
from stem_flex.distributed.prefill import context_prefill
from stem_flex.distributed.split import Split, balanced, zigzag

__all__ = ["Split", "balanced", "context_prefill", "unshard", "zigzag"]
