"""What a run of the benchmarks says: tables for a terminal of 120 columns, a JSON file, a comparison and a figure."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rlkernels
from rlkernels.cli import instruction_set
from suite import backends, copy_bandwidth

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "trl", "verl", "torchrl", "openrlhf", "liger_kernel")
ROW = "  {:<16} {:>10} {:>20} {:>7} {:>8} {:>9}   {}"
HEADER = ROW.format("implementation", "ms", "20 % - 80 %", "GB/s", "of copy", "peak MB", "").rstrip()

BARS_ROW = "  {:<22} {:>10} {:>20} {:>7} {:>13} {:>9} {:>7} {:>14}"
BARS_HEADER = BARS_ROW.format(
    "implementation", "ms", "20 % - 80 %", "ours", "at most", "peak MB", "ours", "at most"
).rstrip()

Result = dict[str, Any]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {threads} thread{'s' * (threads > 1)}, {instruction_set()}"


def git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def environment(device: str) -> Result:
    """Where and of what a run was made."""
    versions = {"rlkernels": rlkernels.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": device_name(device),
        "device_type": device,
        "copy_bytes_per_s": copy_bandwidth(device),
        "commit": (git("rev-parse", "HEAD") or "unknown") + changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".json"


def by_case(results: list[Result]) -> dict[str, list[Result]]:
    cases: dict[str, list[Result]] = {}
    for result in results:
        cases.setdefault(result["case"], []).append(result)
    return cases


def ours_and_peers(results: list[Result], device: str) -> tuple[Result | None, list[Result]]:
    """The fastest of our kernels in one case, and everything measured that is not ours."""
    measured = [result for result in results if "p50" in result]
    kernels = [result for result in measured if result["implementation"] in backends(device)[1:]]
    peers = [r for r in measured if r["implementation"] not in backends(device) and not r.get("floor")]
    return min(kernels, key=lambda result: result["p50"], default=None), peers


def times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 20 else f"{ratio:.2f}x"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{2 if seconds >= 1e-3 else 4}f}"


def table(results: list[Result], device: str, copy_bandwidth: float) -> str:
    """One case: each implementation a line, and how many times as fast ours is."""
    if any(result.get("bar") or result.get("most_bytes") for result in results):
        return table_of_bars(results, device)
    ours, peers = ours_and_peers(results, device)
    best = min(peers, key=lambda peer: peer["p50"], default=None)
    lines = [results[0]["case"], HEADER]
    for result in results:
        name = result["implementation"]
        if "p50" not in result:
            lines.append(unmeasured(result))
            continue
        note = ""
        if result is ours and best is not None:
            note = f"{times(best['p50'] / result['p50'])} the best peer ({best['implementation']})"
        elif ours is not None and result in peers:
            ratio = result["p50"] / ours["p50"]
            note = f"ours {times(ratio)}"
            if wanted := result["wanted"]:
                note += f", {times(wanted)} {'met' if ratio >= wanted else 'MISSED'}"
        bandwidth = result["bytes_moved"] / result["p50"]
        row = ROW.format(
            name,
            milliseconds(result["p50"]),
            f"{milliseconds(result['p20'])} - {milliseconds(result['p80'])}",
            f"{bandwidth / 1e9:.2f}",
            f"{bandwidth / copy_bandwidth:.0%}",
            f"{result['peak_bytes'] / 1e6:.2f}",
            note,
        )
        lines.append(row.rstrip())
    return "\n".join(lines) + "\n"


def unmeasured(result: Result) -> str:
    what = "WRONG, not timed" if "wrong" in result else "absent"
    return f"  {result['implementation']:<16} {what}: {result.get('wrong') or result['absent']}"[:120]


def net_peak(result: Result) -> int:
    """Above the inputs and the gradients that are returned, which every implementation must have."""
    return max(result["peak_bytes"] - result["gradient_bytes"], 0)


def table_of_bars(results: list[Result], device: str) -> str:
    """One case: of each implementation's time and memory, what share ours takes and what it may take. Of several ways
    to write the same the fastest counts."""
    ours, _ = ours_and_peers(results, device)
    fastest: dict[str, Result] = {}
    for result in results:
        if "p50" in result and (bar := result["bar"]):
            fastest[bar["of"]] = min(fastest.get(bar["of"], result), result, key=lambda one: one["p50"])

    def share(measure: Callable[[Result], float], result: Result, most: float | None) -> tuple[str, str]:
        if ours is None or result["implementation"] in backends(device):
            return "", ""
        whole = measure(result)
        ratio = measure(ours) / whole if whole else float("inf")
        verdict = "" if most is None else f"{most:.2f} {'met' if ratio <= most else 'MISSED'}"
        return (f"{ratio:.2f}x" if ratio < 1000 else "-"), verdict

    lines = [results[0]["case"], BARS_HEADER]
    for result in results:
        if "p50" not in result:
            lines.append(unmeasured(result))
            continue
        counts = result in fastest.values()
        bar = result["bar"] if counts else {"time": None, "memory": None}
        time = share(lambda one: one["p50"], result, bar["time"])
        memory = ("", "") if result["floor"] else share(net_peak, result, bar["memory"])
        if result is ours and (most := result["most_bytes"]):
            memory = "", f"{most / 1e6:,.0f} {'met' if net_peak(result) <= most else 'MISSED'}"
        spread = f"{milliseconds(result['p20'])} - {milliseconds(result['p80'])}"
        peak = f"{net_peak(result) / 1e6:,.1f}"
        row = BARS_ROW.format(result["implementation"], milliseconds(result["p50"]), spread, *time, peak, *memory)
        lines.append(row.rstrip())
    return "\n".join(lines) + "\n"


def write(path: Path, content: Result) -> None:
    """All of it or nothing: an interrupted run leaves an older file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Result:
    """Raises OSError, and ValueError for what is not the file of a run."""
    try:
        content = json.loads(path.read_text())
        assert all(isinstance(content[name], str) for name in ("device", "commit", "date"))
        assert isinstance(content["versions"], dict)
        for result in content["results"]:
            assert all(isinstance(result[name], str) for name in ("case", "implementation"))
            assert result.get("p50", 1.0) > 0
    except (ValueError, AssertionError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a file that `rlkernels bench --save` wrote") from error
    return content


def comparison(old: Result, new: Result) -> str:
    lines = [f"compared with {old['commit'][:12]} of {old['date']}"]
    for package, version in new["versions"].items():
        if (before := old["versions"].get(package)) != version:
            lines.append(f"  {package} {before or 'absent'} -> {version or 'absent'}")
    row = "  {:<70} {:>12} {:>12} {:>10}"
    lines.append(row.format("", "then, ms", "now, ms", "then/now"))
    before = {(result["case"], result["implementation"]): result for result in old["results"] if "p50" in result}
    found = False
    for result in new["results"]:
        then = before.get((result["case"], result["implementation"]))
        if then is None or "p50" not in result:
            continue
        found = True
        name = f"{result['case']}, {result['implementation']}"
        ratio = f"{then['p50'] / result['p50']:.2f}"
        lines.append(row.format(name, milliseconds(then["p50"]), milliseconds(result["p50"]), ratio))
    if not found:
        lines.append("  nothing was measured in both")
    return "\n".join(lines)


def plot(run: Result, path: Path) -> None:
    """For each case how many times as fast as each peer ours is."""
    from matplotlib import pyplot

    device = run["device_type"]
    bars = []
    for case, results in by_case(run["results"]).items():
        ours, peers = ours_and_peers(results, device)
        if ours is not None and results[0]["op"] != "call_overhead":
            bars += [(case, peer["implementation"], peer["p50"] / ours["p50"]) for peer in peers]
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.16 * len(bars)), layout="constrained")
    cases = list(dict.fromkeys(case for case, _, _ in bars))
    colors = dict(zip(dict.fromkeys(peer for _, peer, _ in bars), pyplot.get_cmap("tab20").colors, strict=False))
    for number, (_, peer, ratio) in enumerate(bars):
        axes.barh(number, ratio - 1, left=1, color=colors[peer])
        axes.annotate(
            f"{times(ratio)} {peer}", (max(ratio, 1), number), (4, 0), textcoords="offset points", va="center", size=6
        )
    middles = [[number for number, bar in enumerate(bars) if bar[0] == case] for case in cases]
    axes.set_yticks([sum(rows) / len(rows) for rows in middles], cases, size=7)
    for rows in middles[1:]:
        axes.axhline(rows[0] - 0.5, color="0.9", linewidth=0.6)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xmargin(0.15)
    axes.set_ymargin(0.01)
    axes.set_xlim(left=min(0.7, *(0.8 * ratio for _, _, ratio in bars)))
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as each peer, ratio of medians in one run\n{run['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
