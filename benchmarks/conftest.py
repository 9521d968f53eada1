"""What every benchmark shares: the device's name in the header, and one small table of ratios at the end."""

import platform
from collections import defaultdict
from pathlib import Path

import pytest
import torch

OURS = ("cpu", "triton", "cuda")
"""Names of implementations that are this package's kernels; "copy" is a yardstick, all others are peers."""

_medians: dict[str, dict[str, float]] = defaultdict(dict)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


@pytest.fixture
def record(benchmark):
    """Call it after timing: notes the bytes moved and GB/s beside the result, and keeps the median for the table."""

    def keep(group: str, name: str, device: str, moved: int) -> None:
        if benchmark.disabled:
            return
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(device=device_name(device), bytes_moved=moved, gb_per_s=moved / median / 1e9)
        _medians[group][name] = median

    return keep


def pytest_report_header() -> list[str]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [f"{device}: {device_name(device)}" for device in devices] + [f"torch {torch.__version__}"]


def pytest_terminal_summary(terminalreporter) -> None:
    if not _medians:
        return
    terminalreporter.section("kernels beside the fastest peer, medians")
    row = "{:<46} {:>7} {:>9}   {:<16} {:>9} {:>8} {:>8}"
    terminalreporter.line(row.format("", "", "ms", "fastest peer", "ms", "speed-up", "x copy"))
    for group, medians in _medians.items():
        peers = {name: median for name, median in medians.items() if name not in (*OURS, "reference", "copy")}
        peer = min(peers, key=peers.__getitem__, default=None)
        for name in OURS:
            if name not in medians or peer is None:
                continue
            copies = f"{medians[name] / medians['copy']:.2f}" if "copy" in medians else ""
            speedup = f"{peers[peer] / medians[name]:.2f}"
            ours, theirs = f"{medians[name] * 1e3:.2f}", f"{peers[peer] * 1e3:.2f}"
            terminalreporter.line(row.format(group, name, ours, peer, theirs, speedup, copies))
