"""Model and optimiser, one update at a time, with fallbacks for kernels, the compiler and memory."""

from __future__ import annotations

import time

import numpy as np
import torch
from data import VALUE
from journal import Log
from model import ModelConfig, NeedleLM, head_loss, layer_forward
from torch import Tensor


class Trainer:
    """Model, optimiser, and fallbacks that keep a run alive: other attention kernels, no compilation, less memory."""

    def __init__(self, config: ModelConfig, device: torch.device, compiled: bool, log: Log, seed: int) -> None:
        self.model = NeedleLM(config)
        self.model.reset_parameters(seed)
        self.model.to(device)
        self.model.eager_layer = layer_forward
        self.device, self.log, self.micro, self.updates = device, log, 1, 0
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")
        self.fallbacks = ["flash", "eager", "micro", "micro"] if device.type == "cuda" else ["eager", "micro"]
        self._compile(compiled)

    def _compile(self, compiled: bool) -> None:
        self.compiled = compiled
        for name in (
            "recompile_limit",
            "cache_size_limit",
            "accumulated_recompile_limit",
            "accumulated_cache_size_limit",
        ):
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 256)
        self.model.layer = torch.compile(layer_forward, dynamic=False) if compiled else layer_forward
        self.model.head = torch.compile(head_loss, dynamic=False) if compiled else head_loss

    def fall_back(self) -> bool:
        """Take the next fallback after a failed step; False when none is left."""
        if not self.fallbacks:
            return False
        name = self.fallbacks.pop(0)
        self.log(f"fallback: {name}")
        self.optimizer.zero_grad(set_to_none=True)
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if name == "flash":
            set_backend("flash")
            self.model.repeat_kv = True
            self._compile(self.compiled)
        elif name == "eager":
            self._compile(False)
        else:
            self.micro *= 4
        return True

    def step(self, tokens: np.ndarray, marks: np.ndarray, lr: float) -> Tensor:
        """One update; returns a tensor [lm loss, answer loss, value accuracy, gradient norm], not synchronised."""
        ids = self._move(tokens.astype(np.int64))
        targets = torch.cat((ids[:, 1:], ids[:, :1]), dim=1)
        flags = self._move(marks.astype(np.int64))
        flags = torch.cat((flags[:, 1:], torch.zeros_like(flags[:, :1])), dim=1)
        answers, values = (flags > 0).float(), (flags == VALUE).float()
        lm = torch.ones_like(answers)
        lm[:, -1] = 0
        lm, answer = lm / lm.sum(), answers / answers.sum().clamp(min=1)
        value = values / values.sum().clamp(min=1)
        report = torch.zeros(3, device=self.device)
        rows = max(1, ids.shape[0] // self.micro)
        for i in range(0, ids.shape[0], rows):
            part = slice(i, i + rows)
            loss, correct = self.model.losses(ids[part], targets[part], self.dtype)
            a, b = (loss * lm[part].flatten()).sum(), (loss * answer[part].flatten()).sum()
            (a + b).backward()
            report += torch.stack((a.detach(), b.detach(), (correct * value[part].flatten()).sum()))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.device.type == "cuda":
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # the fused kernel then skips the update
            self.optimizer.step()
        elif torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return torch.cat((report, norm.detach()[None]))

    def _move(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def set_backend(name: str) -> None:
    """Allow one fused attention backend: 'flash' or 'cudnn'."""
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def _attend(q: Tensor, k: Tensor, v: Tensor, repeat: bool) -> Tensor:
    """Causal attention, forward and backward."""
    group = q.shape[1] // k.shape[1]
    pair = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) if repeat else (k, v)
    y = torch.nn.functional.scaled_dot_product_attention(q, *pair, is_causal=True, enable_gqa=not repeat)
    y.backward(torch.full_like(y, 0.5))
    return y


def choose_attention(trainer: Trainer, length: int = 16384) -> None:
    """Time flash attention with and without repeated KV heads; cuDNN only where flash does not run."""
    c = trainer.model.config
    times: dict[tuple[str, bool], float] = {}
    wanted = None
    for name, repeat in (("flash", True), ("flash", False), ("cudnn", True)):
        if name == "cudnn" and times:
            break
        set_backend(name)
        generator = torch.Generator(trainer.device).manual_seed(0)
        shapes = [(4, heads, length, c.head_dim) for heads in (c.num_attention_heads, *[c.num_key_value_heads] * 2)]
        try:
            q, k, v = (
                torch.randn(s, device=trainer.device, dtype=torch.bfloat16, generator=generator, requires_grad=True)
                for s in shapes
            )
            y = _attend(q, k, v, repeat)
            torch.cuda.synchronize()
            begin = time.monotonic()
            for _ in range(3):
                y = _attend(q, k, v, repeat)
            torch.cuda.synchronize()
            seconds = (time.monotonic() - begin) / 3
            found = torch.cat([x.float().flatten()[:100_000] for x in (q.grad, k.grad, v.grad, y.detach())])
            wanted = found if wanted is None else wanted
            close = (found - wanted).abs().max() < 0.05 * wanted.abs().max()
            trainer.log(f"attention {name} repeat_kv={repeat}: {1e3 * seconds:.1f} ms, agrees {bool(close)}")
            if close:
                times[name, repeat] = seconds
        except Exception as error:
            trainer.log(f"attention {name} repeat_kv={repeat}: {type(error).__name__}: {str(error)[:160]}")
    if times:
        name, trainer.model.repeat_kv = min(times, key=times.__getitem__)
        set_backend(name)
    else:
        trainer.model.repeat_kv = True
        for enable in ("flash", "cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{enable}_sdp")(True)
    torch.cuda.empty_cache()
