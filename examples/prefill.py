"""Read a long document with a causal language model, densely and with Stem, and compare.

    python examples/prefill.py                                    # the shipped model, document and question
    python examples/prefill.py --selector stem oracle --density 0.1
    python examples/prefill.py FILE --model DIR --question "..."  # any text, any Hugging Face causal LM folder
    python examples/prefill.py FILE --model smollm2               # pretrained: python -m bench.models smollm2

Reads the prompt once densely and once for each selector (:mod:`stem_flex.selectors`; by default Stem and the
experimental block sketch), all with the same number of blocks in every row, so that only the choice differs.
Prints one table (tokens, blocks computed, time of masks and attention, error of the last logits, answers) and draws
which blocks one layer computed. Without ``--question`` a sentence is hidden in the document and asked for. Without a
model it runs on a tiny Llama of random weights, whose answers mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

try:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError:
    sys.exit("this example needs transformers; pip install 'stem-flex[hf,plot]'")

from prefill_timing import Run, Stopwatch

from bench import models, tasks
from stem_flex import StemConfig, oam_scores, selectors, tpd_budget
from stem_flex.diagnostics import plot_block_mask
from stem_flex.integrations import hf, hf_attention, hf_versions

HERE = Path(__file__).resolve().parent
MODEL = HERE / "needle_lm"
DOCUMENT = MODEL / "document.txt"
INTRO = "Some special magic numbers are hidden in the following text. You will be asked for the numbers later.\n\n"
KEY, VALUE = "amber-falcon", "4831907"
NEEDLE = f"\nOne of the special magic numbers for {KEY} is: {VALUE}."
SINK, LOCAL = 1, 2  # blocks that every row keeps, counted in --density
QUESTION = (
    f"\n\nQuestion: What is the special magic number for {KEY} in the text above?\n"
    f"Answer: The special magic number for {KEY} is:"
)


@dataclass(frozen=True)
class Hidden:
    """What is hidden and asked for, in words that a model knows."""

    intro: str
    sentence: str
    value: str
    question: str


NUMBER = Hidden(INTRO, NEEDLE, VALUE, QUESTION)
FACT = Hidden(
    "Some facts are hidden in the following text. Find them and memorize them. You will be asked about them later.\n\n",
    "\nThe lantern is hidden in Oslo.",
    "Oslo",
    "\n\nQuestion: Where is the lantern hidden?\nAnswer: The lantern is hidden in",
)


class ByteTokenizer:
    """Text as its UTF-8 bytes, for a model without a tokenizer."""

    vocabulary = 256
    frame = tasks.Frame()
    hidden = NUMBER

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FolderTokenizer:
    """The tokenizer of a model folder.

    ``frame``: its chat format, or a leading beginning-of-text token. ``hidden``: what to hide and ask for.
    """

    def __init__(self, folder: Path):
        self.inner = AutoTokenizer.from_pretrained(folder)
        bos = self.inner.bos_token_id
        chat = self.inner.chat_template is not None
        self.hidden = FACT if chat else NUMBER
        self.frame = tasks.chat_frame(self.inner) if chat else tasks.Frame(() if bos is None else (bos,))

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


def builder(name: str) -> Callable:
    """The BlockMask function of a selector, with the budgets that were fitted to the density in place of its own."""
    selector = replace(selectors.get(name), settings={}, budget=None)
    choose = hf_attention.stem_block_mask  # as it is now: while the stopwatch runs, the name stands for this function

    def build(*tensors: Any, **options: Any) -> Any:
        return choose(*tensors, **options | {"selector": selector})

    return build


def fitted(density: float, blocks: int) -> StemConfig:
    """Stem with the largest budget that computes at most ``density`` of the causal block pairs."""

    def part(config: StemConfig) -> float:
        kept = tpd_budget(blocks, config).clamp(min=SINK + LOCAL)
        return float(torch.minimum(kept, candidates).sum() / candidates.sum())

    candidates = torch.arange(1, blocks + 1)
    forced = StemConfig(schedule="fixed", k_start=1, sink_blocks=SINK, local_blocks=LOCAL)
    tried = [replace(forced, k_start=k) for k in range(1, blocks + 1)]
    if density >= 1:
        return replace(forced, k_start=1.0, mu=1.0)
    return max((config for config in tried if part(config) <= density), key=part, default=tried[0])


def load(folder: Path | None, device: torch.device) -> tuple[Any, Any, bool]:
    """(model, tokenizer, trained) of a folder, or a tiny random Llama over bytes."""
    if folder is None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=ByteTokenizer.vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1 << 20,
            initializer_range=0.06,  # enough for attention that is not uniform
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        return model.to(device).eval(), ByteTokenizer(), False
    dtype = "auto" if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval(), FolderTokenizer(folder), True


def prompt_ids(
    tokenizer: Any, text: str, length: int, question: str | None, depth: float
) -> tuple[list[int], int | None]:
    """``length`` tokens: the document's beginning, the question, and the hidden sentence if none was asked.

    Returns also where the hidden value stands.
    """
    hidden = tokenizer.hidden
    head = [*tokenizer.frame.before, *(tokenizer.encode(hidden.intro) if question is None else [])]
    needle = tokenizer.encode(hidden.sentence) if question is None else []
    asked = hidden.question if question is None else f"\n\nQuestion: {question}\nAnswer:"
    tail = tokenizer.frame.tail(asked, tokenizer.encode)
    room = length - len(head) - len(needle) - len(tail)
    if room < 1:
        sys.exit(f"--length must be more than {length - room}, got {length}; the question takes that much")
    body = tokenizer.encode(text)[:room]
    if not needle:
        return head + body + tail, None
    before = tokenizer.decode(body[: int(len(body) * depth)]).rpartition("\n")[0]  # a line of its own
    at = min(len(tokenizer.encode(before)), len(body))
    value = len(head) + at + len(tokenizer.encode(hidden.sentence.partition(hidden.value)[0].rstrip()))
    return head + body[:at] + needle + body[at:] + tail, value


@torch.inference_mode()
def prefill(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, watch: Stopwatch, name: str) -> Run:
    """One timed forward over the prompt, then ``tokens`` tokens of greedy answer from its cache."""
    with watch.installed(hf_attention.stem_block_mask if name == "dense" else builder(name)):
        start = watch.now()
        out = model(ids, use_cache=True, logits_to_keep=1)
        total = watch.now() - start
        logits, cache, answer = out.logits[0, -1].float(), hf_versions.cache_of(out), []
        token = int(logits.argmax())
        for _ in range(tokens):
            answer.append(token)
            out = model(
                torch.tensor([[token]], device=ids.device), use_cache=True, **hf_versions.with_cache(model, cache)
            )
            token = int(out.logits[0, -1].argmax())
            if tokenizer.decode([token]) in ("\n", ""):
                break
    return Run(
        name,
        logits,
        tokenizer.decode(answer).strip(),
        seconds=(total - watch.compile_ms) / 1e3,
        compile_seconds=watch.compile_ms / 1e3,
        mask_ms=watch.mask_ms,
        attention_ms=watch.attention_ms,
        densities=watch.densities,
        seeing=watch.seeing,
        heads=watch.heads,
    )


def trust_compiler() -> None:
    """Skip Inductor's test compilations, 12 s, of whether the compiler knows this CPU's vector instructions.

    Every compiler new enough for PyTorch's headers knows them, but for AMX.
    """
    from torch._inductor import config

    if config.cpp.vec_isa_ok is None and not torch.cpu._is_amx_tile_supported():
        config.cpp.vec_isa_ok = True


def compare(
    model: Any, tokenizer: Any, ids: torch.Tensor, sentence: int | None, options: argparse.Namespace
) -> tuple[list[Run], Any]:
    """The dense run, one of each selector, and the BlockMask of one layer of the first selector."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("layer {task.completed}/{task.total}"),
                   TimeElapsedColumn(), console=options.console, transient=True)  # fmt: skip
    runs, drawn = [], None
    with bar:
        for name in ("dense", *options.selector):
            task = bar.add_task(f"{name}: prefill of {ids.shape[1]:,} tokens", total=layers)
            watch = Stopwatch(ids.device, layers // 2, functools.partial(bar.advance, task), sentence)
            if name != "dense":
                # budgets stay Stem's, whatever the selector's own, so that only the choice of blocks differs
                own = {key: value for key, value in selectors.get(name).settings.items() if key != "mu"}
                config = replace(options.config, **own)
                hf.apply(model, config, dense_layers=options.dense_layers, min_tokens=0)
            runs.append(prefill(model, tokenizer, ids, options.answer, watch, name))
            drawn = drawn or watch.block_mask
    hf.remove(model)
    return runs, drawn


def present(runs: list[Run], tokens: int, options: argparse.Namespace, trained: bool) -> dict[str, float]:
    """Print the table and what it means; returns the relative error of each selector's last logits."""
    dense, *sparse = runs
    errors = {run.name: float((run.logits - dense.logits).norm() / dense.logits.norm()) for run in sparse}
    asked = options.hidden.value if trained and options.question is None else None
    table = Table(title_justify="left", header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column("Stem" if run.name == "stem" else run.name, justify="right")

    def row(label: str, of_dense: str, cell: Callable[[Run], str]) -> None:
        table.add_row(label, of_dense, *map(cell, sparse))

    row("tokens", f"{tokens:,}", lambda run: f"{tokens:,}")
    row("layers, of which sparse", f"{dense.layers}, 0", lambda run: f"{run.layers}, {len(run.densities)}")
    row("blocks computed", "100.0 %", lambda run: f"{100 * run.computed:.1f} %")
    row("building masks", "-", lambda run: f"{sum(run.mask_ms):,.0f} ms")
    row("attention", f"{sum(dense.attention_ms):,.0f} ms", lambda run: f"{sum(run.attention_ms):,.0f} ms")
    row("whole prefill", f"{dense.seconds:,.2f} s", lambda run: f"{run.seconds:,.2f} s")
    row("compilation, once", "-", lambda run: f"{run.compile_seconds:,.1f} s")
    row("error of the last logits", "-", lambda run: f"{errors[run.name]:.2e}")
    if asked:
        row("heads that see the sentence", "all", lambda run: f"{run.seeing} of {run.heads}")
    row("answer", _answer(dense, asked), lambda run: _answer(run, asked))
    options.console.print(table)
    if not trained:
        options.console.print("The model has random weights: its answers mean nothing, times and errors do.")
    if asked:
        options.console.print("Only the prompt is sparse; answers are decoded with dense attention over its cache.")
    for run in runs if asked else ():
        if asked not in run.answer:
            options.console.print(_why(run, dense, asked))
    return errors


def _answer(run: Run, asked: str | None) -> str:
    return repr(run.answer) + (("\nright" if asked in run.answer else "\nWRONG") if asked else "")


def _why(run: Run, dense: Run, asked: str) -> str:
    if asked not in dense.answer:
        return f"{run.name}: the model does not find the sentence with dense attention either."
    seen = f"{run.name}: the question's rows computed the sentence's block in {run.seeing} of {run.heads} heads"
    if selectors.get(run.name).scores is oam_scores:
        return (
            f"{seen}. Its score averages all pairs of tokens of two blocks, and this small model finds the sentence "
            "by single pairs, which the mean hides: python -m bench.accuracy measures it."
        )
    return f"{seen}."


def context(folder: Path | None) -> int:
    """Tokens that a model was made for."""
    settings = json.loads((folder / "config.json").read_text()) if folder else {}
    return settings.get("text_config", settings).get("max_position_embeddings", 1 << 20)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=DOCUMENT, help="text to read")
    parser.add_argument("--model", type=models.model_argument, help="folder of a causal LM, or smollm2: bench.models")
    # two cores take 78 s for 16,384 tokens, densely and with one selector, compilation included
    length = 16384 if torch.cuda.is_available() or torch.get_num_threads() >= 8 else 8192
    note = f"tokens of the whole prompt, here {length}, at most half the model's context if not given"
    parser.add_argument("--length", type=int, help=note)
    parser.add_argument("--question", default=None, help="default: hide a sentence and ask for it")
    parser.add_argument("--answer", type=int, default=12, help="most tokens of the answer")
    parser.add_argument("--depth", type=float, default=0.4, help="where the sentence is hidden, 0 to 1")
    parser.add_argument("--selector", nargs="+", default=["stem", "sketch"], choices=selectors.names(),
                        metavar="NAME", help=f"default stem sketch; of {', '.join(selectors.names())}")  # fmt: skip
    parser.add_argument("--density", type=float, default=0.25, help="part of the blocks to compute, default 0.25")
    parser.add_argument("--preset", choices=("default", "operator", "paper"), help="instead: a published budget")
    parser.add_argument("--dense-layers", type=int, nargs="*", default=[], help="layers to leave dense, default none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", type=Path, default=Path("prefill.png"), help="where to draw the blocks")
    options = parser.parse_args(arguments)
    if not options.file.exists():
        parser.error(f"{options.file} does not exist")
    if not 0 < options.density <= 1:
        parser.error(f"--density must be in (0, 1], got {options.density}")
    if options.model is None and (MODEL / "config.json").exists():
        options.model = MODEL
    if options.length is None:
        options.length = min(length, context(options.model) // 2)
    if options.preset is None:
        options.config = fitted(options.density, -(-options.length // 128))
    else:
        options.config = StemConfig() if options.preset == "default" else getattr(StemConfig, options.preset)()
    options.hidden, options.console = NUMBER, Console()
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, draw; returns the runs, the errors and the picture's path."""
    transformers.logging.set_verbosity_error()
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        trust_compiler()
    model, tokenizer, trained = load(options.model, device)
    text = options.file.read_text(errors="replace")
    options.hidden = tokenizer.hidden
    prompt, sentence = prompt_ids(tokenizer, text, options.length, options.question, options.depth)
    ids = torch.tensor([prompt], device=device)
    name = options.model or "a tiny Llama of random weights"
    options.console.print(f"[bold]{options.file.name}[/bold], read by {name} on {device}")
    runs, block_mask = compare(model, tokenizer, ids, sentence, options)
    errors = present(runs, ids.shape[1], options, trained)
    picture = None
    if block_mask is not None:
        picture = plot_block_mask(block_mask, options.picture, config=options.config, title=options.file.name)
        options.console.print(f"wrote {picture}")
    return {"runs": {run.name: run for run in runs}, "errors": errors, "picture": picture, "trained": trained}


if __name__ == "__main__":
    result = main()
    sparse = [run for name, run in result["runs"].items() if name != "dense"]
    assert all(run.densities for run in sparse), "every selector must have chosen blocks in at least one layer"
    assert all(torch.isfinite(run.logits).all() for run in sparse)
