"""``generate`` with a model that is prepared: whose prompt a forward reads, and so which budget it has."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList  # noqa: E402

import stem_flex.integrations.hf as stem_hf  # noqa: E402
from stem_flex import reference  # noqa: E402
from stem_flex.integrations.hf_prompts import Prompt, tokens_of  # noqa: E402
from stem_flex.integrations.hf_versions import release, with_cache  # noqa: E402
from tests.hf_models import BY_BLOCK, KEEP_ALL, kept, prompt, tiny_model  # noqa: E402

ONE = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
TWO = ONE | {"max_new_tokens": 2}


@pytest.fixture
def sparse(llama):
    """A tiny Llama whose budget is half the blocks of the prompt, so that budgets tell prompts apart."""
    return stem_hf.apply(llama, BY_BLOCK, dense_layers=(), min_tokens=0)


def spent(selections, queries, keys):
    """The selections of forwards of these sizes, each of them compared with the budget of a prompt of ``keys``."""
    found = [(q, k, v, mask) for q, k, v, _, mask in selections if (q.shape[2], k.shape[2]) == (queries, keys)]
    assert found, [(q.shape[2], k.shape[2]) for q, k, *_ in selections]
    return all(torch.equal(kept(mask), reference.block_keep(q, k, v, BY_BLOCK)) for q, k, v, mask in found)


class Asks(LogitsProcessor):
    """Reads a prompt of its own with a model at every step, over a cache or not."""

    def __init__(self, model, ids, cached=False):
        self.model, self.ids, self.cached = model, ids, cached

    def __call__(self, input_ids, scores):
        cache = with_cache(self.model, DynamicCache(config=self.model.config)) if self.cached else {}
        self.model(self.ids, **cache)
        return scores


# The chunk before the last leaves nothing, a token or enough for another: what is left may be no prefill at all.
@pytest.mark.parametrize("chunk", [None, 48, 95, 60])
@pytest.mark.parametrize("static", [False, True])
def test_a_shorter_negative_prompt_has_its_own_budget(chunk, static, sparse, exactly, selections):
    options = {"prefill_chunk_size": chunk} if chunk else {}
    options |= {"cache_implementation": "static"} if static else {}
    sparse.generate(prompt(tokens=96), negative_prompt_ids=prompt(tokens=64), guidance_scale=1.5, **TWO, **options)
    assert spent(selections, 64, 64)


def test_a_longer_negative_prompt_has_its_own_budget(sparse, exactly, selections):
    options = TWO | {"prefill_chunk_size": 32}
    sparse.generate(prompt(tokens=64), negative_prompt_ids=prompt(tokens=96), guidance_scale=1.5, **options)
    assert spent(selections, 96, 96)


@pytest.mark.parametrize("cached", [False, True])
def test_prompts_that_a_logits_processor_reads_have_their_own_budget(cached, sparse, exactly, selections):
    processors = LogitsProcessorList([Asks(sparse, prompt(tokens=64), cached)])
    sparse.generate(prompt(tokens=96), logits_processor=processors, prefill_chunk_size=48, **TWO)
    assert spent(selections, 64, 64)


def test_another_models_prompt_is_its_own(sparse, exactly, selections):
    other = copy.deepcopy(sparse)
    other.__dict__.pop("generate")  # as one that was loaded under the name alone
    with_other = LogitsProcessorList([Asks(other, prompt(tokens=64))])
    stem_hf.apply(sparse, BY_BLOCK, dense_layers=(), min_tokens=50)
    sparse.generate(prompt(tokens=49), logits_processor=with_other, prefill_chunk_size=48, **ONE)
    assert spent(selections, 64, 64)


def test_assisted_generation_keeps_the_budget_of_each_prompt(sparse, exactly, selections):
    assistant = copy.deepcopy(sparse)
    ids = prompt(batch=1, tokens=96)
    expected = sparse.generate(ids, **ONE | {"max_new_tokens": 5})
    selections.clear()
    assisted = sparse.generate(ids, assistant_model=assistant, **ONE | {"max_new_tokens": 5})
    assert assisted[0, 96] == expected[0, 96]
    assert spent(selections, 96, 96)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "prefill_chunk_size": 48},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_ways_to_generate_are_the_models_own(options, llama, exactly):
    ids = prompt(batch=1)
    options = ONE | {"max_new_tokens": 5, "eos_token_id": 63} | options
    expected = llama.generate(ids, **options)
    stem_hf.apply(llama, KEEP_ALL, dense_layers=(), min_tokens=0)
    with stem_hf.trace() as seen:
        assert torch.equal(llama.generate(ids, **options), expected)
    assert seen.count()["stem"] >= 2


@pytest.mark.parametrize("only_new", [False, True])
def test_a_second_turn_counts_what_the_cache_holds(only_new, sparse, exactly, selections):
    if not only_new and release() < (5, 23):
        pytest.skip("transformers before 5.23 takes the first turn for padding where chunks repeat it")
    ids, cache = prompt(tokens=192), DynamicCache(config=sparse.config)
    with torch.no_grad():
        sparse(ids[:, :96], **with_cache(sparse, cache))
    selections.clear()
    given = ids[:, 96:] if only_new else ids
    mask = torch.ones_like(ids)
    sparse.generate(given, attention_mask=mask, prefill_chunk_size=48, **with_cache(sparse, cache), **ONE)
    q, k, v, _, mask = selections[0]
    assert (q.shape[2], k.shape[2]) == (48, 144)
    assert torch.equal(kept(mask), reference.block_keep(q, k, v, BY_BLOCK, q_offset=96, prompt_len=192))


def test_embeddings_are_a_prompt_like_any_other(sparse, exactly, selections):
    ids = prompt(tokens=96)
    embeds = sparse.get_input_embeddings()(ids).detach()
    sparse.generate(inputs_embeds=embeds, **ONE)
    assert spent(selections, 96, 96)


def test_prompt_length_holds_for_the_whole_block(sparse, exactly, selections):
    # What the caller says of forwards of his own is not second-guessed: the same prompt may be read twice.
    with torch.no_grad(), stem_hf.prompt_length(96):
        for _ in range(2):
            sparse(prompt(tokens=96))
            selections.clear()
            sparse(prompt(tokens=48))
    q, k, v, _, mask = selections[-1]
    assert torch.equal(kept(mask), reference.block_keep(q, k, v, BY_BLOCK, prompt_len=96))


def test_prompts_that_were_read_are_over():
    mine, other = object(), object()
    part = Prompt(100, mine, once=True)
    assert part.of(mine, 0) == 100
    assert part.of(other, 0) is None
    for offset, config in ((0, mine), (40, other)):
        part.advance(config, offset, 60, None, 0)
        assert part.of(mine, 60) == 100
    part.advance(mine, 60, 39, None, 0)  # one token is left, which is no prefill
    assert part.of(mine, 0) is None
    part = Prompt(1000, once=True)
    part.advance(mine, 0, 872, None, 8192)
    assert part.of(mine, 872) == 1000
    part.advance(mine, 0, 873, None, 8192)
    assert part.of(mine, 873) is None


def test_a_static_caches_prompt_is_told_by_its_offset_and_its_padding_mask():
    mine, counter = object(), torch.tensor(0)
    part = Prompt(100, mine, once=True)
    part.advance(mine, counter, 100, None, 0)
    assert part.of(mine, counter) == 100
    assert part.of(mine, 0) is None
    part.advance(mine, counter, 60, 100, 0)
    assert part.of(mine, counter) is None


def test_the_length_of_a_prompt_is_read_from_what_generate_is_given():
    model = tiny_model("llama", num_hidden_layers=1)
    ids, mask = prompt(tokens=9), torch.ones(2, 12)
    assert tokens_of(model, (ids,), {}) == tokens_of(model, (), {"inputs": ids}) == 9
    assert tokens_of(model, (ids,), {"attention_mask": mask}) == 12
    assert tokens_of(model, (), {"input_ids": ids[:, :0], "inputs_embeds": torch.ones(2, 7, 64)}) == 7
    assert tokens_of(model, (), {"attention_mask": mask}) == 0
