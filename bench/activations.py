"""q, k, v of a real model at the shapes that are timed: random ones have no structure for a threshold to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import attend, models, ruler, tasks

LAYERS = (1, 3, 5, 7)


@torch.inference_mode()
def model_inputs(
    length: int,
    device: torch.device,
    *,
    model: Path | str = models.SHIPPED,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1, 32, length, dim), (1, 8, length, dim) twice: four layers of the shipped model reading unseen text.

    Its layers have 8 query and 2 key heads of 64. They are stacked, and turned into ``dim`` dimensions by a random
    rotation that both sides of a key head share, q times sqrt(dim / 64), so that the logits are the model's own.
    """
    loaded, tokenizer = ruler.load_model(model, device)
    corpus = ruler.read_corpus(tokenizer)
    tokens = np.tile(corpus.tokens, -(-length // len(corpus.tokens)))  # text repeats past its end
    window = torch.from_numpy(tasks.text_windows(tokens, length, 1, seed=seed)).to(device)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer in LAYERS:
            found[layer] = q.clone(), k.clone(), v.clone()
        return attend.Dense()(layer, q, k, v, scale)

    with attend.attending(keep):
        loaded(window, use_cache=False, logits_to_keep=1)
    q, k, v = (torch.cat([found[layer][i] for layer in LAYERS], 1) for i in range(3))
    own, group = q.shape[3], q.shape[1] // k.shape[1]
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(k.shape[1], dim, own, device=device, generator=generator)
    turn = torch.linalg.qr(noise).Q.transpose(1, 2)
    q = torch.einsum("bhld,hde->bhle", q.float() * (dim / own) ** 0.5, turn.repeat_interleave(group, 0))
    k, v = (torch.einsum("bhld,hde->bhle", x.float(), turn) for x in (k, v))
    return q.to(dtype), k.to(dtype), v.to(dtype)
