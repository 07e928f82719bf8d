"""What this machine is and can do: stated in reports, consulted for precision."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Products = Literal["fp32", "tf32", "bf16"]
"""What matrix products take: fp32, the same with its inputs rounded (see `fp32_products`), bf16."""

BF16_GAIN = 1.5
"""bf16 matrix products must beat fp32 by this factor before they are worth their rounding."""

FILES = 1 << 16
"""Open files that a process asks for: a training on a large set maps many shards."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def describe() -> dict[str, Any]:
    """The facts that a reader needs to judge a measured time.

    Returns:
        cpu (model name), cores (usable by this process), memory (bytes), os, python, versions of
        torch, transformers and ray where installed, gpus (names, asked only if torch is loaded).
    """
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit_hash(),
    }
    for package in ("torch", "transformers", "ray"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def cores() -> int:
    """CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def most_files() -> int:
    """Files that this process may hold open. Its limit, with which shells often start it at 1024,
    is raised to `FILES` or as far as the system lets it be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    with suppress(OSError, ValueError):  # macOS has a further limit, which it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of GPUs show under Linux: NVIDIA's, AMD's, and that of Windows beneath."""


def gpus() -> int:
    """GPUs of this machine that torch can use; without a driver torch is not even imported."""
    if not any(map(os.path.exists, _DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count()


def chosen_device(asked: str = "auto") -> str:
    """"cpu" or "cuda", as asked; "auto" is "cuda" where torch sees a GPU, else "cpu".

    Raises:
        ValueError: "cuda" was asked for, and torch sees no GPU.
        RuntimeError: Ray has given this worker a GPU that torch cannot use: it would stay idle
            while the work goes on for days on a few cores.
    """
    import torch

    if asked == "cpu" or torch.cuda.is_available():
        return "cuda" if asked == "auto" else asked
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and (given := ray.get_gpu_ids()):
        raise RuntimeError(
            f"this worker occupies GPU {', '.join(map(str, given))}, which torch "
            f"{torch.__version__} cannot use: run it where torch is built for CUDA and finds the "
            "driver (the image with TORCH_INDEX for CUDA), or ask for no GPUs"
        )
    if asked == "cuda":
        raise ValueError("device 'cuda' was asked for, and no GPU is visible here: workers see "
                         "those that they are given (gpus)")
    return "cpu"


@functools.cache
def fast_bf16(device: str = "cpu") -> bool:
    """Whether bf16 matrix products are faster than fp32 on this machine's "cpu" or "cuda".

    GPUs, and CPUs that have instructions for it, are simply asked: all workers of a run shall hear
    the same, and a busy moment would measure anything. AMX gains 3-10x, AVX-512 BF16 over 2x. Of
    other CPUs, which mostly lose, it is measured, once (~0.1 s).
    """
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.8 has none
    if told.get("amx_bf16") or told.get("avx512_bf16"):
        return True
    return BF16_GAIN * _matmul_seconds("bf16") < _matmul_seconds("fp32")


@contextmanager
def fp32_products(device: str, *, rounded: bool) -> Iterator[None]:
    """Within it, products of fp32 matrices are exact, or may round what they multiply, never what
    they add up: to TF32 (10 bits) on GPUs that have it, to bf16 (7 bits) on CPUs that have it,
    nowhere else. What torch was set to before, for the whole process, comes back."""
    import torch

    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    convolutions = device == "cuda" and cudnn.allow_tf32
    # "high" means TF32 to oneDNN too, which the CPUs of today do not have.
    wanted = ("medium" if device == "cpu" else "high") if rounded else "highest"
    torch.set_float32_matmul_precision(wanted)
    if device == "cuda":  # where convolutions round unless they are told not to
        cudnn.allow_tf32 = rounded
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if device == "cuda":
            cudnn.allow_tf32 = convolutions


@functools.cache
def matmul_flops(products: Products, threads: int) -> float:
    """Operations a second of matrix products on the CPU with torch's present number of `threads`,
    measured once (~0.1 s)."""
    size = 1024
    return 2 * size**3 / _matmul_seconds(products, size)


def _matmul_seconds(products: Products, size: int = 512, repeats: int = 4) -> float:
    import torch

    a = torch.ones(size, size, dtype=torch.bfloat16 if products == "bf16" else torch.float32)
    best = float("inf")
    with fp32_products("cpu", rounded=products == "tf32"):
        a @ a  # the first product pays for set-up
        for _ in range(repeats):
            began = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - began)
    return best


def keep_freed_memory(*, one_pool: bool = False) -> None:
    """Tells glibc to keep what is freed: by default it gives every large block back to the kernel,
    which fills it with zeros when the next batch asks for it again. That is a sixth of a training
    step of 4M-Tiny on two cores. Does nothing where there is no glibc.

    Args:
        one_pool: Threads that begin from now on share the memory of the main one. Those of their
            own do give blocks back; but many threads would wait for each other.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        if one_pool:
            mallopt(_M_ARENA_MAX, 1)


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_compiler(device: str) -> None:
    """Raises ValueError where torch.compile cannot make code for a device, "cpu" or "cuda"."""
    try:
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        else:
            import triton  # noqa: F401

            # It compiles what starts its kernels on the machine that they run on.
            if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
                raise FileNotFoundError("there is neither gcc nor clang")
    except Exception as error:
        raise ValueError(
            f"compile=True finds no compiler for {device} ({error}); install g++ (CPU), or triton "
            "and gcc (GPU), or take compile=False, which computes the same"
        ) from error


@functools.cache
def commit_hash() -> str:
    """Commit of the checkout this code runs from, "-dirty" if changed; else the version."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    command += ["--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"v{_version()}"


def _version() -> str:
    try:
        return metadata.version("fourm")
    except metadata.PackageNotFoundError:
        return "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
