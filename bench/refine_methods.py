"""The trained selections of ``python -m bench.refine``: the lightning indexer, fitted here, and InfLLM-v2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stem_flex.selectors.infllm import InfLLM, block_attention, compressed_keys

from . import attend
from .refine_policies import Method, policies

FIT_ROWS = 32  # of a step


class Inputs:
    """Keeps every layer's input, which the indexer's weights read."""

    def __init__(self, model: Any):
        self.of: dict[int, Tensor] = {}
        for layer, block in enumerate(model.model.layers):
            block.self_attn.register_forward_pre_hook(self._keeper(layer), with_kwargs=True)

    def _keeper(self, layer: int) -> Callable:
        def keep(module, args, kwargs):
            self.of[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return keep


def logits_of(q: Tensor, k: Tensor, rows: slice, scale: float) -> Tensor:
    """float32 (Hq, rows, keys up to the last row), not masked; one batch row."""
    group = q.shape[1] // k.shape[1]
    keys = k[0, :, : rows.stop].float().repeat_interleave(group, 0)
    return q[0, :, rows].float() @ keys.mT * scale


def future_of(rows: slice, device: Any) -> Tensor:
    """Keys that a strip's rows must not see, bool (rows, keys up to the last row)."""
    own = torch.arange(rows.start, rows.stop, device=device)
    return torch.arange(rows.stop, device=device) > own[:, None]


def fit_indexers(model: Any, ids: Tensor, inputs: Inputs, steps: int) -> dict[int, dict[str, Any]]:
    """Weights of the indexer of every layer, and the divergence they leave, in nats."""
    found: dict[int, dict[str, Any]] = {}

    def fit(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            found[layer] = _fit(q.clone(), k.clone(), inputs.of[layer].clone(), scale, steps)
        return attend.Dense()(layer, q, k, v, scale)

    with torch.inference_mode(), attend.attending(fit):
        model.model(ids.to(model.device), use_cache=False)
    return found


def _fit(q: Tensor, k: Tensor, x: Tensor, scale: float, steps: int) -> dict[str, Any]:
    heads, length = q.shape[1], q.shape[2]
    keys = k[0].float().repeat_interleave(heads // k.shape[1], 0)
    key = torch.arange(length, device=q.device)
    weight = torch.zeros(x.shape[-1], heads, device=q.device, requires_grad=True)
    constant = torch.full((heads,), 0.2, device=q.device, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [weight], "lr": 1e-3}, {"params": [constant], "lr": 1e-2}])
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator = torch.Generator().manual_seed(0)
    last = []
    for _ in range(steps):
        rows = torch.randint(min(64, length // 2), length, (FIT_ROWS,), generator=generator).to(q.device)
        logits = q[0, :, rows].float() @ keys.mT * scale
        hidden = key > rows[:, None]
        wanted = logits.masked_fill(hidden, -math.inf).softmax(-1).mean(0)
        scores = torch.einsum("rh,hrn->rn", x[0, rows].float() @ weight + constant, logits.relu())
        said = scores.masked_fill(hidden, -math.inf).log_softmax(-1).masked_fill(hidden, 0.0)
        loss = (torch.special.xlogy(wanted, wanted) - wanted * said).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight, constant], 1.0)
        optimizer.step()
        rate.step()
        last.append(loss.detach())
    tail = torch.stack(last[-max(1, steps // 10) :])
    return {"weight": weight.detach(), "constant": constant.detach(), "kl": tail.mean().item()}


def methods(length: int, indexers: dict[int, dict[str, Any]], inputs: Inputs, device: Any) -> list[Method]:
    """DSA with fitted and with random weights, and InfLLM-v2, at the budgets of this length."""
    keep = max(16, length // 16)
    random = {
        layer: {
            "weight": torch.zeros_like(found["weight"]),
            "constant": torch.randn(found["constant"].shape, generator=torch.Generator().manual_seed(layer)).to(device),
        }
        for layer, found in indexers.items()
    }

    def lightning(parameters: dict[int, dict[str, Any]]) -> Callable:
        def scores(layer: int, q: Tensor, k: Tensor, logits: Tensor, rows: slice, scale: float) -> Tensor:
            x, own = inputs.of[layer][0, rows].float(), parameters[layer]
            return torch.einsum("rh,hrn->rn", x @ own["weight"] + own["constant"], logits.relu())[None]

        return scores

    sizes = InfLLM(keep=max(4, length * 96 // 32768), local=max(2, length * 33 // 32768))

    def blocks(layer: int, q: Tensor, k: Tensor, logits: Tensor, rows: slice, scale: float) -> Tensor:
        means = compressed_keys(k[:, :, : rows.stop], sizes)
        number = -(-rows.stop // sizes.block)
        return block_attention(q[:, :, rows], means, number, sizes, q_offset=rows.start, scale=scale)[0]

    found = []
    for name, of in (("dsa", indexers), ("dsa unfitted", random)):
        chosen, savings = policies("dsa", length, keep, 1, 0)
        found.append(Method(name, "logit", 1, keep, 0, chosen, lightning(of), savings))
    chosen, savings = policies("infllm", length, sizes.keep, sizes.block, sizes.forced)
    found.append(Method("infllm", "mass", sizes.block, sizes.keep, sizes.forced, chosen, blocks, savings))
    for method in found:
        method.policies = [replace(policy, counts=policy.counts.to(device)) for policy in method.policies]
    return found
