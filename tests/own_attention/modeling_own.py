"""One layer of attention that asks transformers for a mask, and for nothing else."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from stem_flex.integrations.hf_versions import with_cache
from tests.own_attention.configuration_own import OwnConfig


class OwnAttention(nn.Module):
    """Scores of the embeddings themselves, masked by hand."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = x @ x.mT
        return (scores if mask is None else scores + mask[:, 0]).softmax(-1) @ x


class OwnModel(PreTrainedModel):
    """Embeddings and :class:`OwnAttention`."""

    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.embed = nn.Embedding(64, config.hidden_size)
        self.attention = OwnAttention()
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(input_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=embedded, attention_mask=None, **with_cache(create_causal_mask, None)
        )
        return self.attention(embedded, mask)
