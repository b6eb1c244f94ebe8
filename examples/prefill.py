"""Read a long document with a causal language model, densely and with Stem, and compare.

    python examples/prefill.py                                    # the shipped model, document and question
    python examples/prefill.py FILE --model DIR --question "..."  # any text, any Hugging Face causal LM folder

Prints one table (tokens, blocks computed, time of mask and attention, error of the last logits, both answers)
and draws which blocks one layer computed. Without ``--question`` a sentence is hidden in the document and asked
for. Without a model it runs on a tiny Llama of random weights, whose answers mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

try:
    import transformers
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
except ImportError:
    sys.exit("this example needs transformers; pip install 'stem-flex[hf,plot]'")

from stem_flex import StemConfig, block_density
from stem_flex.diagnostics import plot_block_mask
from stem_flex.integrations import hf, hf_attention

HERE = Path(__file__).resolve().parent
MODEL = HERE / "needle_lm"
DOCUMENT = MODEL / "document.txt"
INTRO = "Some special magic numbers are hidden in the following text. You will be asked for the numbers later.\n\n"
KEY, VALUE = "amber-falcon", "4831907"
NEEDLE = f"\nOne of the special magic numbers for {KEY} is: {VALUE}."
QUESTION = (
    f"\n\nQuestion: What is the special magic number for {KEY} in the text above?\n"
    f"Answer: The special magic number for {KEY} is:"
)


class ByteTokenizer:
    """Text as its UTF-8 bytes, for a model without a tokenizer."""

    vocabulary = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FolderTokenizer:
    """The tokenizer of a model folder, without special tokens but a leading beginning-of-text one."""

    def __init__(self, folder: Path):
        self.inner = AutoTokenizer.from_pretrained(folder)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


@dataclass
class Run:
    """What one prefill took and said."""

    logits: torch.Tensor
    answer: str
    seconds: float
    compile_seconds: float
    mask_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    layers: int = 0


class Stopwatch:
    """Times attention and mask building by wrapping the functions that do it; keeps one layer's BlockMask."""

    def __init__(self, device: torch.device, kept_layer: int, advance: Callable[[], None]):
        self.device, self.kept_layer, self.advance = device, kept_layer, advance
        self.mask_ms: list[float] = []
        self.densities: list[float] = []
        self.block_mask: Any = None
        self._calls: dict[tuple[str, int], list[float]] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    def mask(self, build: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            block_mask = build(*args, **kwargs)
            self.mask_ms.append(self.now() - start)
            self.densities.append(block_density(block_mask))
            if len(self.mask_ms) <= max(1, self.kept_layer):
                self.block_mask = block_mask
            return block_mask

        return timed

    def attention(self, attend: Callable, kind: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            query = next(x for x in args if torch.is_tensor(x) and x.dim() == 4)
            if query.shape[2] == 1:  # decode
                return attend(*args, **kwargs)
            start = self.now()
            out = attend(*args, **kwargs)
            # one BlockMask for all heads is another compilation than one of each head's own
            heads = args[3].kv_num_blocks.shape[1] if kind == "sparse" else 0
            self._calls.setdefault((kind, heads), []).append(self.now() - start)
            self.advance()
            return out

        return timed

    @property
    def attention_ms(self) -> list[float]:
        """Time of every layer, without the compilation that the first compiled call of a kind waits for."""
        return [ms for calls in self._calls.values() for ms in (calls if len(calls) == 1 else _steady(calls))]

    @property
    def compile_ms(self) -> float:
        """What the first calls took beyond the others."""
        return sum(sum(calls) - sum(_steady(calls)) for calls in self._calls.values() if len(calls) > 1)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap while the block runs."""
        sdpa = AttentionInterface._global_mapping["sdpa"]
        with ExitStack() as stack:
            for name, wrapped in (
                ("stem_block_mask", self.mask(hf_attention.stem_block_mask)),
                ("sparse_prefill", self.attention(hf_attention.sparse_prefill, "sparse")),
                ("dense_causal", self.attention(hf_attention.dense_causal, "dense")),
            ):
                stack.enter_context(mock.patch.object(hf_attention, name, wrapped))
            stack.callback(AttentionInterface.register, "sdpa", sdpa)
            AttentionInterface.register("sdpa", self.attention(sdpa, "dense"))
            yield


def _steady(calls: list[float]) -> list[float]:
    usual = statistics.median(calls[1:])
    return [min(calls[0], usual), *calls[1:]]


def load(folder: Path | None, device: torch.device) -> tuple[Any, Any, bool]:
    """(model, tokenizer, trained) of a folder, or a tiny random Llama over bytes."""
    if folder is None:
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


def prompt_ids(tokenizer: Any, text: str, length: int, question: str | None, depth: float) -> list[int]:
    """``length`` tokens: the document's beginning, the question, and the hidden sentence if none was asked."""
    bos = getattr(getattr(tokenizer, "inner", None), "bos_token_id", None)
    head = ([] if bos is None else [bos]) + (tokenizer.encode(INTRO) if question is None else [])
    needle = tokenizer.encode(NEEDLE) if question is None else []
    tail = tokenizer.encode(QUESTION if question is None else f"\n\nQuestion: {question}\nAnswer:")
    room = length - len(head) - len(needle) - len(tail)
    if room < 1:
        sys.exit(f"--length must be more than {length - room}, got {length}; the question takes that much")
    body = tokenizer.encode(text)[:room]
    if not needle:
        return head + body + tail
    before = tokenizer.decode(body[: int(len(body) * depth)]).rpartition("\n")[0]  # a line of its own
    at = min(len(tokenizer.encode(before)), len(body))
    return head + body[:at] + needle + body[at:] + tail


@torch.inference_mode()
def prefill(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, watch: Stopwatch) -> Run:
    """One timed forward over the prompt, then ``tokens`` tokens of greedy answer from its cache."""
    with watch.installed():
        start = watch.now()
        out = model(ids, use_cache=True, logits_to_keep=1)
        total = watch.now() - start
        logits, cache, answer = out.logits[0, -1].float(), out.past_key_values, []
        token = int(logits.argmax())
        for _ in range(tokens):
            answer.append(token)
            out = model(torch.tensor([[token]], device=ids.device), past_key_values=cache, use_cache=True)
            token = int(out.logits[0, -1].argmax())
            if tokenizer.decode([token]) in ("\n", ""):
                break
    return Run(
        logits=logits,
        answer=tokenizer.decode(answer).strip(),
        seconds=(total - watch.compile_ms) / 1e3,
        compile_seconds=watch.compile_ms / 1e3,
        mask_ms=watch.mask_ms,
        attention_ms=watch.attention_ms,
        densities=watch.densities,
        layers=len(watch.attention_ms),
    )


def compare(model: Any, tokenizer: Any, ids: torch.Tensor, options: argparse.Namespace) -> tuple[Run, Run, Any]:
    """The dense run, the Stem run, and the BlockMask of one layer."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("layer {task.completed}/{task.total}"),
                   TimeElapsedColumn(), console=options.console, transient=True)  # fmt: skip
    runs, watch = [], None
    with bar:
        for name in ("dense", "Stem"):
            task = bar.add_task(f"{name} prefill of {ids.shape[1]:,} tokens", total=layers)
            watch = Stopwatch(ids.device, layers // 2, lambda task=task: bar.advance(task))
            if name == "Stem":
                hf.apply(model, options.config, dense_layers=options.dense_layers, min_tokens=0)
            runs.append(prefill(model, tokenizer, ids, options.answer, watch))
    hf.remove(model)
    assert watch is not None
    return runs[0], runs[1], watch.block_mask


def present(dense: Run, stem: Run, ids: torch.Tensor, options: argparse.Namespace, trained: bool) -> float:
    """Print the table; returns the relative error of the last logits."""
    error = float((stem.logits - dense.logits).norm() / dense.logits.norm())
    computed = (sum(stem.densities) + stem.layers - len(stem.densities)) / max(1, stem.layers)
    per_layer = statistics.mean(stem.densities) if stem.densities else 1.0
    table = Table(title_justify="left", header_style="bold")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("Stem", justify="right")
    table.add_row("tokens", f"{ids.shape[1]:,}", f"{ids.shape[1]:,}")
    table.add_row("layers, of which sparse", str(dense.layers), f"{stem.layers}, {len(stem.densities)}")
    table.add_row("blocks computed", "100.0 %", f"{computed:.1%} (sparse layers {per_layer:.1%})")
    table.add_row("building masks", "-", f"{sum(stem.mask_ms):,.1f} ms")
    table.add_row("attention", f"{sum(dense.attention_ms):,.1f} ms", f"{sum(stem.attention_ms):,.1f} ms")
    table.add_row("whole prefill", f"{dense.seconds:,.2f} s", f"{stem.seconds:,.2f} s")
    table.add_row("compilation, once", "-", f"{stem.compile_seconds:,.1f} s")
    table.add_row("error of the last logits", "-", f"{error:.2e}")
    same = "same" if int(dense.logits.argmax()) == int(stem.logits.argmax()) else "different"
    table.add_row("next token", "", same)
    table.add_row("answer", repr(dense.answer), repr(stem.answer))
    if trained and options.question is None:
        table.add_row("hidden value", VALUE, "found" if VALUE in stem.answer else "not found")
    options.console.print(table)
    if not trained:
        options.console.print("The model has random weights: its answers mean nothing, times and errors do.")
    return error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=DOCUMENT, help="text to read")
    parser.add_argument("--model", type=Path, default=None, help="folder of a Hugging Face causal LM")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the whole prompt")
    parser.add_argument("--question", default=None, help="default: hide a sentence and ask for it")
    parser.add_argument("--answer", type=int, default=12, help="most tokens of the answer")
    parser.add_argument("--depth", type=float, default=0.4, help="where the sentence is hidden, 0 to 1")
    parser.add_argument("--preset", default="default", choices=("default", "operator", "paper"))
    parser.add_argument("--keep", type=float, help="instead: first rows keep this share of the blocks")
    parser.add_argument("--dense-layers", type=int, nargs="*", help="default: 0 1, none with random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", type=Path, default=Path("prefill.png"), help="where to draw the blocks")
    options = parser.parse_args(arguments)
    for path in (options.file, options.model):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if options.keep is not None:
        options.config = StemConfig(schedule="fixed", k_start=options.keep)
    else:
        options.config = StemConfig() if options.preset == "default" else getattr(StemConfig, options.preset)()
    if options.model is None and (MODEL / "config.json").exists():
        options.model = MODEL
    if options.dense_layers is None:
        options.dense_layers = [] if options.model is None else [0, 1]
    options.console = Console()
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, draw; returns the runs, the error and the picture's path."""
    transformers.logging.set_verbosity_error()
    options = parse(arguments)
    device = torch.device(options.device)
    model, tokenizer, trained = load(options.model, device)
    text = options.file.read_text(errors="replace")
    ids = torch.tensor([prompt_ids(tokenizer, text, options.length, options.question, options.depth)], device=device)
    name = options.model or "a tiny Llama of random weights"
    options.console.print(f"[bold]{options.file.name}[/bold], read by {name} on {device}")
    dense, stem, block_mask = compare(model, tokenizer, ids, options)
    error = present(dense, stem, ids, options, trained)
    picture = None
    if block_mask is not None:
        picture = plot_block_mask(block_mask, options.picture, config=options.config, title=options.file.name)
        options.console.print(f"wrote {picture}")
    return {"dense": dense, "stem": stem, "error": error, "picture": picture, "trained": trained}


if __name__ == "__main__":
    result = main()
    assert result["stem"].densities, "Stem must have chosen blocks in at least one layer"
    assert torch.isfinite(result["stem"].logits).all()
