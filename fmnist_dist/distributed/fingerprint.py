"""What decides a kernel's bits on this machine: same fingerprint, same bits."""

import platform
from pathlib import Path

import torch

_FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "sve"}


def fingerprint(device: torch.device) -> dict[str, str]:
    """Return torch's version, the instruction set that its kernels choose by, and the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": " ".join(sorted(_FLAGS & _cpu_flags())),
        "device": name,
    }


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
