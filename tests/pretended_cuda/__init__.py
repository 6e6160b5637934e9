"""A pretended GPU under torch's own CUDA code: a runtime whose device is memory of the host, and kernels that compute on the CPU.

Allocators and their statistics, streams, events, page-locked memory, autocast and ``torch.cuda`` are the real ones. Kernels that
are compiled at run time, NCCL and cuDNN are not pretended; collectives are Gloo's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent


def missing() -> str:
    """What building the pretended GPU lacks; empty if it lacks nothing."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if shutil.which("g++") is None:
        return "there is no g++"
    return "" if _headers() else "there are no headers of CUDA's runtime"


def build(folder: Path) -> None:
    """Build its libraries in a folder."""
    torch_folder = Path(torch.__file__).parent
    of_torch = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10", "-lc10_cuda", "-ltorch_cpu"]
    compiler = ["g++", "-shared", "-fPIC", "-O1", "-w", *(f"-I{path}" for path in _headers())]
    commands = (
        [*compiler, "-x", "c", str(HERE / "driver.c"), "-o", str(folder / "libcuda.so.1")],
        [*compiler, "-x", "c", str(HERE / "nvml.c"), "-o", str(folder / "libnvidia-ml.so.1")],
        [*compiler, "-x", "c", str(HERE / "runtime.c"), "-o", str(folder / "libruntime.so")],
        [*compiler, "-std=c++20", str(HERE / "kernels.cpp"), *of_torch, "-o", str(folder / "libkernels.so")],
    )
    for command in commands:
        subprocess.run(command, check=True)
    # Python imports it when it starts.
    (folder / "sitecustomize.py").write_text("import tests.pretended_cuda.kernels\n")


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Python has the pretended GPU, from the folder of :func:`build`."""
    root = str(HERE.parents[1])
    # Without what tells tests of the worker that they run in.
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "CUDA_VISIBLE_DEVICES": "0",
        "LD_PRELOAD": str(folder / "libruntime.so"),
        "LD_LIBRARY_PATH": ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "LIT_LORA_CUDA_KERNELS": str(folder / "libkernels.so"),
        "PYTHONPATH": ":".join(filter(None, [str(folder), root, os.environ.get("PYTHONPATH")])),
    }


def _headers() -> list[Path]:
    """Folders with the headers of CUDA's runtime: of the packages that torch brings, and what they lack from Triton's."""
    major = str(torch.version.cuda).partition(".")[0]
    nvidia, triton = find_spec("nvidia"), find_spec("triton")
    found = [Path(path, f"cu{major}", "include") for path in (nvidia and nvidia.submodule_search_locations) or ()]
    found += [Path(path, "backends/nvidia/include") for path in (triton and triton.submodule_search_locations) or ()]
    names = {path.name for folder in found for path in folder.glob("cuda_runtime_api.h")}
    has_types = any((folder / "crt/host_defines.h").exists() for folder in found)
    return found if names and has_types and found[0].is_dir() else []
