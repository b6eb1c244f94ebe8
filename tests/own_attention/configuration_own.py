"""A model type whose attention does not go through transformers' interface, whatever becomes of transformers' own."""

from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    """Sizes of :class:`tests.own_attention.modeling_own.OwnModel`."""

    model_type = "own_attention"

    def __init__(self, hidden_size: int = 16, **options):
        self.hidden_size = hidden_size
        super().__init__(**options)
