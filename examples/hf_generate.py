"""One line in transformers: a model generates with Stem's sparse prefill, everything else unchanged.

    python examples/hf_generate.py                                  # a tiny random model, on the CPU
    python examples/hf_generate.py --model smollm2 --text long.txt  # after python -m bench.models smollm2
    python examples/hf_generate.py --model meta-llama/Llama-3.1-8B-Instruct --text long.txt

Needs the hf extra: ``pip install 'stem-flex[hf]'``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stem_flex.integrations.hf as stem_hf
from bench import models
from stem_flex import StemConfig


def tiny() -> tuple[LlamaForCausalLM, torch.Tensor]:
    """A random Llama of two layers and a prompt of 600 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(3, 256, (1, 600))


def loaded(name: str, text: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model of the hub or a folder, in bfloat16, and a prompt from a file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(models.model_folder(name)) if name in models.SOURCES else name
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
    ids = AutoTokenizer.from_pretrained(name)(text.read_text(), return_tensors="pt").input_ids
    return model, ids.to(device)


def main(arguments: list[str] | None = None) -> None:
    """Generate with the model's own attention, with every block kept, and with Stem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="name or folder; without it a tiny random one")
    parser.add_argument("--text", type=Path, help="file with the prompt, with --model")
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.model and not options.text:
        parser.error("--model needs --text")
    model, ids = loaded(options.model, options.text) if options.model else tiny()

    def generate() -> torch.Tensor:
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=0)
        print(f"  {time.perf_counter() - start:.2f} s: {out[0, ids.shape[1] :].tolist()}")
        return out

    print(f"{ids.shape[1]} tokens, the model's own attention:")
    expected = generate()

    print("stem_flex, every block kept:")
    keep_all = StemConfig(schedule="fixed", k_start=1.0)
    stem_hf.apply(model, keep_all, dense_layers=(), min_tokens=0)
    with stem_hf.trace() as seen:
        kept = generate()
    print(f"  attention calls: {dict(seen.count())}")
    assert seen.count()["stem"] > 0
    assert options.model or torch.equal(kept, expected), "every block kept is the model's own attention"

    print("stem_flex, as it comes:" if options.model else "stem_flex, one block of five and the forced ones:")
    config = None if options.model else StemConfig(schedule="fixed", k_start=1, sink_blocks=1, local_blocks=1)
    stem_hf.apply(model, config, **({} if options.model else {"dense_layers": (0,), "min_tokens": 0}))
    with stem_hf.trace() as seen:
        generate()
    print(f"  stem in layers {seen.layers('stem')}, dense in {seen.layers('exact') + seen.layers('dense')}")

    stem_hf.remove(model)
    assert torch.equal(generate(), expected), "removed, the model is as it was"


if __name__ == "__main__":
    main()
