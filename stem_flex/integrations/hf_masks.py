"""The mask function of the transformers integration: what a forward's mask is made of, kept instead of a tensor.

transformers calls a mask function once per layer type and forward, before the first layer, and hands whatever
it returns to every attention call. :func:`stem_mask` returns a :class:`StemMask` for a prefill: sizes, offsets,
padding and the recognised structure of the mask. The layers of a forward share it, and with it one binding
and one structural BlockMask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask

from stem_flex.integrations import hf_versions
from stem_flex.integrations.hf_interface import refuse_undivided_heads, refuse_without_interface
from stem_flex.integrations.hf_patterns import KeyRange, SharedLayout, key_range, kind_of, recognise
from stem_flex.integrations.hf_prompts import current_prompt
from stem_flex.integrations.hf_settings import (
    Settings,
    is_prefill,
    raw_settings,
    read_settings,
    refuse_own_selection,
)
from stem_flex.layout import Layout, causal, documents, from_mask_mod, sliding_window
from stem_flex.mask import layout_block_mask


class StemMask:
    """The mask of a prefill, for all layers of one type: not a tensor, and no N x N anywhere.

    Attributes:
        batch, queries, keys: sizes that the attention call must have.
        offset: position of the first query among the keys given; an int, or an int32 tensor (1,).
        kind: "causal": plain causal, for Stem; "packed": causal within packed sequences, for Stem; "local":
            window or chunk; "general": any other mask function.
        settings: the integration's options, parsed.
        prompt: tokens of the whole prompt that these are a part of, where that is known.
    """

    ndim = 4  # a 2-D mask is what transformers would take for a padding mask

    def __init__(
        self,
        *,
        batch: int,
        queries: int,
        keys: int,
        offset: int | Tensor,
        kv_offset: int,
        mask_function: Callable,
        padding: Tensor | None,
        settings: Settings,
        device: torch.device,
        prompt: int | None = None,
    ):
        self.batch, self.queries, self.keys = batch, queries, keys
        self.offset, self.kv_offset = offset, kv_offset
        self.mask_function, self.padding = mask_function, padding
        self.settings, self.device = settings, device
        self.prompt = prompt if kv_offset == 0 else None
        # What a longer buffer holds beyond the last query is no padding, only not yet there.
        seen = None if isinstance(offset, Tensor) else offset + queries
        self.start, self.end, whole = key_range(None if padding is None else padding[:, :seen])
        self.pattern = recognise(mask_function) if whole else None
        self.kind = kind_of(self.pattern, kv_offset + keys)
        self._kv_len: Tensor | None = None
        self._prompt_len: Tensor | None = None
        self._layout: SharedLayout | None = None
        self._block_masks: dict[tuple, BlockMask] = {}
        self._moved: dict[torch.device, StemMask] = {}

    @property
    def used_keys(self) -> int:
        """Keys worth handing on: a static cache's free slots end the buffer, where the host knows it."""
        if isinstance(self.offset, Tensor) or self.pattern is None:
            return self.keys
        return min(self.keys, self.offset + self.queries)

    @property
    def kv_len(self) -> Tensor | None:
        """Valid keys, where only the device knows them."""
        if not isinstance(self.offset, Tensor) or self.pattern is None:
            return None
        if self._kv_len is None:
            self._kv_len = (self.offset + self.queries).clamp(max=self.keys)
        return self._kv_len

    @property
    def query_offset(self) -> int | Tensor:
        """``q_offset`` to bind the layout with: a mask function that was not recognised has it inside."""
        return 0 if self.pattern is None else self.offset

    @property
    def prompt_len(self) -> int | Tensor | None:
        """Tokens of the whole prompt per row, where it is longer than what this forward sees."""
        if self.prompt is None or self.kind != "causal":
            return None
        if isinstance(self.offset, int) and self.prompt <= self.offset + self.queries:
            return None
        if self.start is None:
            return self.prompt
        if self._prompt_len is None:
            self._prompt_len = self.prompt - self.start
        return self._prompt_len

    @property
    def layout(self) -> SharedLayout:
        """The mask as a layout."""
        if self._layout is None:
            with torch.inference_mode(False):  # bindings look at tensor versions, which inference tensors lack
                self._layout = SharedLayout(self._general() if self.pattern is None else self._recognised())
        return self._layout

    def _recognised(self) -> Layout:
        pattern = self.pattern
        assert pattern is not None
        layout = causal()
        if self.start is not None and self.end is not None:
            layout = KeyRange(self.start, self.end)
        if pattern.packed is not None:
            layout = layout & documents(ids=pattern.packed.to(self.device))
        if self.kind == "local" and pattern.window is not None:
            layout = layout & sliding_window(pattern.window)
        if self.kind == "local" and pattern.chunk is not None:
            layout = layout & documents(ids=pattern.chunks(self.keys, self.kv_offset, self.device))
        return layout

    def _general(self) -> Layout:
        function, padding = self.mask_function, self.padding
        if padding is not None and padding.shape[1] < self.keys:
            padding = torch.nn.functional.pad(padding, (0, self.keys - padding.shape[1]))
        offset, kv_offset = self.offset, self.kv_offset
        last_query, last_key = self.queries - 1, self.keys - 1

        def mask_mod(b, h, q, kv):
            # flex_attention asks for indices rounded up to whole tiles, the mask function may index by them
            q, kv = q.clamp(max=last_query), kv.clamp(max=last_key)
            # offset counts from the first key given, the mask function from the first of all
            kept = function(b, h, q + offset + kv_offset, kv + kv_offset)
            return kept if padding is None else kept & padding[b, kv]

        return from_mask_mod(mask_mod, self.batch, 1, self.queries, self.keys)

    def structure(self, block_size: tuple[int, int]) -> BlockMask:
        """The whole mask as a BlockMask of shape (B or 1, 1, queries, used keys), built once."""
        if block_size not in self._block_masks:
            with TransformGetItemToIndex():  # mask functions index tensors by batch and position
                self._block_masks[block_size] = layout_block_mask(
                    self.layout,
                    self._rows,
                    1,
                    self.queries,
                    self.used_keys,
                    q_offset=self.query_offset,
                    kv_len=self.kv_len,
                    block_size=block_size,
                    device=self.device,
                )
        return self._block_masks[block_size]

    @property
    def _rows(self) -> int:
        """Batch rows that differ: all, or 1 where nothing in the mask depends on the row."""
        if self.pattern is None or self.start is not None:
            return self.batch
        narrowing = (self.pattern.packed, self.pattern.chunk_start if self.kind == "local" else None)
        return max((x.shape[0] for x in narrowing if x is not None), default=1)

    def to(self, device: Any, *args: Any, **kwargs: Any) -> StemMask:
        """The same mask for layers on another device (``device_map``), made once per device."""
        device = torch.device(device) if not isinstance(device, torch.device) else device
        if device == self.device:
            return self
        if device not in self._moved:
            if self.pattern is None:
                raise NotImplementedError(
                    f"this model's mask function holds tensors of {self.device} and cannot serve layers on "
                    f"{device}; load the model on one device, or use attn_implementation='sdpa'"
                )
            move = {"device": device, "non_blocking": True}
            moved = type(self)(
                batch=self.batch,
                queries=self.queries,
                keys=self.keys,
                offset=self.offset.to(**move) if isinstance(self.offset, Tensor) else self.offset,
                kv_offset=self.kv_offset,
                mask_function=self.mask_function,
                padding=None if self.padding is None else self.padding.to(**move),
                settings=self.settings,
                device=device,
                prompt=self.prompt,
            )
            self._moved[device] = moved
        return self._moved[device]

    def contiguous(self) -> StemMask:
        """Itself: ``generate`` asks this of the masks it builds ahead, and there is no tensor to lay out."""
        return self

    def check(self, query: Tensor, key: Tensor) -> None:
        """Raise unless the attention call has the sizes that this mask was made for."""
        batch, _, queries, _ = query.shape
        if (batch, queries, key.shape[2]) != (self.batch, self.queries, self.keys):
            raise ValueError(
                f"stem_flex's mask is for {self.batch} rows of {self.queries} queries and {self.keys} keys, got "
                f"{batch}, {queries} and {key.shape[2]}: this model changes its keys or queries after the mask "
                "was made; use attn_implementation='sdpa' or 'eager'"
            )

    def _no_tensor(self, *args: Any) -> NoReturn:
        raise TypeError(
            "this model computes with its attention mask, which stem_flex keeps as block lists, not as a tensor; "
            "use model.set_attn_implementation('sdpa' or 'eager')"
        )

    __getitem__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __invert__ = _no_tensor
    __and__ = __or__ = __eq__ = __ne__ = __lt__ = __gt__ = _no_tensor  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> NoReturn:
        hint = ""
        if hasattr(Tensor, name):
            hint = (
                ": this model takes its attention mask for a tensor, which stem_flex's is not; "
                "use model.set_attn_implementation('sdpa' or 'eager')"
            )
        raise AttributeError(f"StemMask has no attribute {name!r}{hint}")


def stem_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = hf_versions.causal,
    attention_mask: Tensor | StemMask | None = None,
    config: Any = None,
    **kwargs: Any,
) -> StemMask | Tensor | None:
    """A :class:`StemMask` for a prefill, else the mask of the fallback attention.

    The signature is that of ``transformers.AttentionMaskInterface``. Bidirectional masks, decode steps and
    short or tiny chunks (:func:`~stem_flex.integrations.hf_settings.is_prefill`) get the fallback's mask.

    Raises:
        NotImplementedError: a model that selects its own keys.
        TypeError: a model whose attention does not go through transformers' attention interface.
        TypeError, ValueError: settings on the config that are not as ``Settings.to_json`` makes them.
        ValueError: heads that the tensor parallel ranks do not divide.
    """
    if not isinstance(attention_mask, StemMask):
        refuse_own_selection(config)
        refuse_without_interface(config)
        refuse_undivided_heads(config)
    return mask_of(
        StemMask, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, **kwargs
    )


def mask_of(
    cls: type[StemMask],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | StemMask | None,
    config: Any,
    **kwargs: Any,
) -> StemMask | Tensor | None:
    """What :func:`stem_mask` returns for a model that is served, its prefill masks of class ``cls``."""
    if isinstance(attention_mask, StemMask):
        return attention_mask  # generate builds masks ahead, and the model passes them through here again
    if not torch.compiler.is_compiling():
        read_settings(config)  # for its errors, which should not wait for the first long prompt
    settings = raw_settings(config)
    one_way = "allow_is_bidirectional_skip" not in kwargs
    if one_way and is_prefill(settings, q_length, kv_offset + kv_length):
        device = kwargs.get("device")
        build: Any = _build  # the decorator is typed as a factory
        return build(
            cls, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, device
        )
    fallback = hf_versions.eager_mask if settings.get("fallback", "sdpa") == "eager" else hf_versions.sdpa_mask
    return fallback(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )


@torch.compiler.disable
def _build(
    cls, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, device
) -> StemMask:
    offset = q_offset - kv_offset
    if isinstance(offset, Tensor):
        # A static cache's offset is its live counter, which the first layer's update moves on in place.
        offset = offset.to(dtype=torch.int32, copy=True).reshape(1)
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if device is None:
        device = "cpu" if padding is None else padding.device
    settings = read_settings(config)
    prompt = current_prompt.get()
    mask = cls(
        batch=batch_size,
        queries=q_length,
        keys=kv_length,
        offset=offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        padding=padding,
        settings=settings,
        device=torch.device(device),
        prompt=None if prompt is None else prompt.of(config, q_offset),
    )
    if prompt is not None and mask.kind == "causal":
        seen = None if attention_mask is None else attention_mask.shape[1]
        prompt.advance(config, q_offset, q_length, seen, settings.min_tokens)
    return mask
