"""Mixins over vLLM's attention classes: a plan for each batch, sparse prefill for its sparse rows.

Each stands before vLLM's class among the bases, so that everything it does not serve goes on to that class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stem_flex.attention import sparse_prefill
from stem_flex.integrations.hf_settings import Settings
from stem_flex.integrations.vllm import logger
from stem_flex.integrations.vllm.counters import counters
from stem_flex.integrations.vllm.options import asked, impl_reason, layer_reason, refuse, settings_of
from stem_flex.integrations.vllm.plan import Plan, Row, Run, runs_between, sparse_rows
from stem_flex.integrations.vllm.runners import prompt_lengths, warn_once, watch_runners
from stem_flex.mask import stem_block_mask

_PLAN = "stem_plan"  # attribute of vLLM's metadata


class SparseBuilder:
    """Over an ``AttentionMetadataBuilder``: hangs a :class:`Plan` on the metadata of batches with sparse rows."""

    supports_update_block_table = False  # vLLM's copies metadata under another group's pages, and a plan's runs not
    stem_own = True  # vLLM's layers of other kinds derive builders that rewrite the batch: these do not plan

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.stem_settings: Settings | None = None
        self.stem_capturing = False
        if not asked(vllm_config):
            return
        refuse(vllm_config)
        settings = settings_of(vllm_config)
        if self._choose_layers(kv_cache_spec, layer_names, vllm_config, settings):
            self.stem_settings = settings

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """At most uniform batches: a graph of a mixed batch would replay without a plan."""
        from vllm.v1.attention.backend import AttentionCGSupport

        found = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        if not asked(vllm_config):
            return found
        return min(found, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self.stem_settings is not None:
            counters.poll()
            if not fast_build and not self.stem_capturing:
                plan = self._plan(common_attn_metadata, self.stem_settings)
                if plan is not None:
                    setattr(metadata, _PLAN, plan)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        self.stem_capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self.stem_capturing = False

    def _choose_layers(self, spec: Any, names: list[str], vllm_config: Any, settings: Settings) -> bool:
        """Tell each layer of the group whether it runs sparse, and the log."""
        layers, reasons = vllm_config.compilation_config.static_forward_context, {}
        own, model = "stem_own" in type(self).__dict__, vllm_config.model_config
        for name in names:
            layer, number = layers[name], _number(name)
            reason = layer_reason(layer, getattr(spec, "kv_cache_specs", {}).get(name, spec))
            if reason is None and not own:
                reason = f"attention by {type(self).__name__}"
            if reason is None and model.rswa_window is not None:
                reason = "reference sliding window (R-SWA)"
            if reason is None and number >= getattr(model.hf_text_config, "num_hidden_layers", number + 1):
                reason = "drafts"  # of a speculator, whose layers are numbered after the model's
            if reason is None and number in settings.dense_layers:
                reason = "dense_layers"
            layer.impl.stem_reason = reasons[number] = reason
            layer.impl.stem_sparse = reason is None
        sparse = sorted(number for number, reason in reasons.items() if reason is None)
        for name in names:
            layers[name].impl.stem_first = bool(sparse) and _number(name) == sparse[0]
        own_class = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("vllm."))
        logger().info("stem_flex: %s", _summary(own_class.__name__, sparse, reasons, settings))
        return bool(sparse)

    def _plan(self, common: Any, settings: Settings) -> Plan | None:
        if common.max_query_len <= 1 or common.causal is not True or common.rswa_prefix_lens is not None:
            return None
        if common.mm_req_doc_ranges is not None and any(common.mm_req_doc_ranges.values()):
            warn_once("batches with bidirectional ranges (images) run by vLLM's own attention")
            return None
        if common.is_prefilling is None or common.seq_lens_cpu_upper_bound is None:
            warn_once("a batch came without is_prefilling or lengths on the host, and ran by vLLM's own attention")
            return None
        starts = common.query_start_loc_cpu.tolist()
        rows = sparse_rows(
            starts,
            common.seq_lens_cpu_upper_bound.tolist(),
            common.is_prefilling.tolist(),
            prompt_lengths(self.vllm_config, common),  # type: ignore[attr-defined]
            settings,
        )
        if not rows:
            return None
        cuts = runs_between(rows, starts, common.num_actual_tokens)
        return Plan(rows, tuple(self._run(common, starts, *cut) for cut in cuts))

    def _run(self, common: Any, starts: list[int], first: int, last: int, start: int, stop: int) -> Run:
        """vLLM's metadata of the requests [first, last) as a batch of their own."""
        part, tokens = slice(first, last), slice(start, stop)

        def cut(values: Any, by: slice = part) -> Any:
            return None if values is None else values[by]

        keys = common.seq_lens_cpu_upper_bound[part]
        sub = common.replace(
            query_start_loc=common.query_start_loc[first : last + 1] - common.query_start_loc[first],
            query_start_loc_cpu=common.query_start_loc_cpu[first : last + 1] - start,
            seq_lens=common.seq_lens[part],
            num_reqs=last - first,
            num_actual_tokens=stop - start,
            max_query_len=max(b - a for a, b in zip(starts[first:last], starts[first + 1 : last + 1], strict=True)),
            max_seq_len=int(keys.max()),
            block_table_tensor=common.block_table_tensor[part],
            slot_mapping=common.slot_mapping[tokens],
            positions=cut(common.positions, tokens),
            is_prefilling=cut(common.is_prefilling),
            seq_lens_cpu_upper_bound=keys,
            req_idx=cut(common.req_idx),
            mm_req_doc_ranges=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        # fast_build: FlashAttention 3 keeps schedules in one buffer, which holds the whole batch's, for dense layers
        return Run(first, last, start, stop, super().build(0, sub, fast_build=True))  # type: ignore[misc]


class SparseImpl:
    """Over an ``AttentionImpl``: sparse rows by Stem, the runs between them and everything else by vLLM's class."""

    stem_gather: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]  # a staticmethod, see cache.py

    stem_sparse = False  # set by the builder, which knows the layer's number
    stem_first = False
    stem_reason: str | None = "no KV cache"

    def __init__(self, *args: Any, **kwargs: Any):
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.stem_settings = settings_of(config)
        self.stem_lengths = (config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len)
        watch_runners()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Shapes as vLLM has them: query and output (T, Hq, D), key and value (T, Hkv, D), their K and V cached."""
        dense: Any = super()
        plan: Plan | None = getattr(attn_metadata, _PLAN, None)
        if plan is None or not self.stem_sparse or output_scale is not None or output_block_scale is not None:
            if attn_metadata is None and query.is_cuda and impl_reason(self) is None:
                self._rehearse(query, key)
            return dense.forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        for run in plan.runs:
            part = slice(run.start, run.stop)
            dense.forward(layer, query[part], key[part], value[part], kv_cache, run.metadata, output[part])
        started = counters.start(query)
        for row in plan.rows:
            part = slice(row.start, row.stop)
            if row.offset:
                pages = attn_metadata.block_table[row.index, : -(-row.keys // kv_cache.shape[2])]
                k, v = self.stem_gather(kv_cache, pages, row.keys)
            else:
                k, v = _heads_first(key[part]), _heads_first(value[part])
            out = self._prefill(_heads_first(query[part]), k, v, row)
            output[part].copy_(out[0].transpose(0, 1))
        counters.stop(started)
        return output

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, row: Row | None) -> Tensor:
        settings = self.stem_settings
        mask = stem_block_mask(
            q,
            k,
            v,
            settings.config,
            q_offset=k.shape[2] - q.shape[2],
            prompt_len=row.prompt if row else k.shape[2],
            selector=settings.selector,
            budget=settings.budget,
        )
        if row is not None:
            counters.add(mask, row.allowed, row.queries, q.shape[1], self.stem_first)
        correction = settings.config.correction
        out = sparse_prefill(q, k, v, mask, scale=self.scale, correction=correction)  # type: ignore[attr-defined]
        assert isinstance(out, Tensor)
        return out

    def _rehearse(self, query: Tensor, key: Tensor) -> None:
        """While vLLM measures memory: the largest chunk over the longest cache, once, and what is to be compiled.

        What this allocates vLLM then leaves free. Whole prompts and chunks, at multiples of 128 and others, each twice,
        for a second length compiles for all.
        """
        kind = (type(self), query.shape[1:], key.shape[1:], query.dtype, query.device)
        if kind in _rehearsed:
            return
        _rehearsed.add(kind)
        queries, keys = min(self.stem_lengths), self.stem_lengths[1]
        pairs = [(queries, keys), (queries - 128, keys - 128), (queries - 1, keys - 1), (queries - 3, keys - 5)]
        pairs += [(queries, queries), (queries - 128,) * 2, (queries - 1,) * 2, (queries - 3,) * 2]
        for lengths in dict.fromkeys(pairs):
            if min(lengths) >= 256:
                q = _heads_first(query.new_zeros((lengths[0], *query.shape[1:])))
                both = key.new_zeros((1, key.shape[1], lengths[1], 2 * key.shape[2]))
                if lengths[0] == lengths[1]:  # as a prompt without a prefix comes
                    k = v = _heads_first(key.new_zeros((lengths[1], *key.shape[1:])))
                else:
                    k, v = both.chunk(2, dim=3)
                self._prefill(q, k, v, None)


_rehearsed: set[Any] = set()


def _heads_first(x: Tensor) -> Tensor:
    """(T, H, D) as (1, H, T, D), without a copy."""
    return x.transpose(0, 1)[None]


def _number(name: str) -> int:
    """The layer's number in vLLM's name of it, "model.layers.3.self_attn.attn"; -1 where it has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _summary(builder: str, sparse: list[int], reasons: dict[int, str | None], settings: Settings) -> str:
    """One line that says which layers run sparse, over which of vLLM's classes, and why others do not."""
    base = builder.removesuffix("MetadataBuilder")
    config, groups = settings.config, {}
    for number, reason in sorted(reasons.items()):
        if reason is not None:
            groups.setdefault(reason, []).append(number)
    dense = "; ".join(f"{reason}: {_ranges(numbers)}" for reason, numbers in groups.items())
    chosen = f"selector {settings.selector or 'of the config'}, budget "
    if settings.budget is not None:
        chosen += str(settings.budget)
    else:
        chosen += config.schedule if config.k_start is None else f"{config.schedule} k_start {config.k_start}"
    return (
        f"prefill of prompts from {settings.min_tokens} tokens runs sparse in layers {_ranges(sparse) or 'none'} over "
        f"{base} ({chosen}, blocks {config.query_block} x {config.key_block})"
        + (f"; dense layers: {dense}" if dense else "")
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
