"""The machine a benchmark ran on, in a line."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import torch


def describe_machine() -> str:
    """Date, processor, cores, memory, torch and the load average: a high load means that others worked there too."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].split(":")[1].strip() if models else "unknown processor"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "; no GPU"
    return (
        f"{date.today().isoformat()}; {os.cpu_count()} cores of {model}{gpu}; {memory_gib:.0f} GiB; "
        f"torch {torch.__version__}; load average at the end {load}"
    )
