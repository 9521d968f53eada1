"""`rlkernels bench`: times the kernels next to what people use today. See docs/benchmarks.md."""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

import reporting
from rlkernels.cli_errors import BadValue

FOLDER = Path(__file__).parent
SUITES = sorted(FOLDER.glob("test_*.py"))
IMAGES = reporting.ROOT / "docs" / "images"
INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""


class Reporter:
    """A pytest plugin in place of pytest's own reports: prints each case when all its implementations are measured."""

    def __init__(self, device: str, copy_bandwidth: float) -> None:
        self.device, self.copy_bandwidth = device, copy_bandwidth
        self.results: list[reporting.Result] = []
        self.errors: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config) -> None:
        config.pluginmanager.unregister(name="terminalreporter")

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.errors.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")

    def pytest_runtest_logstart(self, nodeid) -> None:
        if sys.stderr.isatty():
            name = nodeid.partition("[")[2].rstrip("]")
            print(f"\r\033[K{name[:110]} ...", end="", file=sys.stderr, flush=True)

    def pytest_runtest_logreport(self, report) -> None:
        result = dict(report.user_properties).get("benchmark")
        if report.when != "call" or result is None:
            if report.failed:
                self.errors.append(f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")
            return
        if report.skipped:
            result["absent"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            result["wrong"] = report.longrepr.reprcrash.message.splitlines()[0].removeprefix("suite.WrongResult: ")
        if self.results and self.results[-1]["case"] != result["case"]:
            self.print_last_case()
        self.results.append(result)

    def pytest_sessionfinish(self) -> None:
        self.print_last_case()

    def print_last_case(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if self.results:
            last = list(reporting.by_case(self.results).values())[-1]
            print(reporting.table(last, self.device, self.copy_bandwidth), flush=True)


def load(suite: Path) -> ModuleType:
    """By its path: the tests of an op have the same name."""
    spec = importlib.util.spec_from_file_location(f"_{suite.stem}", suite)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ops() -> list[str]:
    """The names of the ops of all suites."""
    return sorted({case.op for suite in SUITES for case in load(suite).CASES})


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rlkernels bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--op", help="one op; without it, all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--save", type=Path, metavar="OUT.json", help="a folder: a file named after the device in it")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="ratios to a run that was saved")
    parser.add_argument("--plot", action="store_true", help="draw the figure of the README")

    def refuse(message: str) -> NoReturn:
        raise BadValue(message)

    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadValue("--device cuda: no GPU is available to PyTorch")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.op is not None and options.op not in (known := ops()):
        raise BadValue(f"--op {options.op}: want one of {', '.join(known)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise BadValue("--plot: matplotlib is not installed")
    if options.save is not None:
        options.save = place(options.save, options.device)
    if options.compare is not None:
        options.compare = older_run(options.compare, options.device)
    return options


def place(path: Path, device: str) -> Path:
    """Where to save. Whether that can work is known before anything is measured."""
    try:
        target = path if path.suffix == ".json" and not path.is_dir() else path / reporting.file_name(device)
        existing = next(folder for folder in target.absolute().parents if folder.exists())
    except OSError as error:
        raise BadValue(f"--save {path}: {error.strerror}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadValue(f"--save {path}: cannot write in {existing}")
    return target


def older_run(path: Path, device: str) -> reporting.Result:
    try:
        run = reporting.read(path)
    except OSError as error:
        raise BadValue(f"--compare {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadValue(f"--compare {path}: {error}") from error
    if run["device"] != (here := reporting.device_name(device)):
        raise BadValue(f"--compare {path}: measured on {run['device']}; this is {here}: no ratio would mean anything")
    return run


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    run = reporting.environment(options.device)
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    print(f"{'GPU' if options.device == 'cuda' else 'CPU'}: {run['device']}\n{versions}\ncommit {run['commit']}")
    print(f"a copy moves {run['copy_bytes_per_s'] / 1e9:.1f} GB/s\n", flush=True)

    reporter = Reporter(options.device, run["copy_bytes_per_s"])
    pytest_options = ["-s", "-W", "ignore", "-p", "no:cacheprovider", "--benchmark-quiet", f"--device={options.device}"]
    pytest_options += [f"--rootdir={reporting.ROOT}", f"-c{reporting.ROOT / 'pyproject.toml'}"]
    pytest_options += [f"--op={options.op}"] if options.op else []
    status = pytest.main([*pytest_options, *map(str, SUITES)], plugins=[reporter])
    if status == pytest.ExitCode.INTERRUPTED and not reporter.errors:
        print("interrupted: nothing was saved", file=sys.stderr)
        return INTERRUPTED
    for error in reporter.errors:
        print(f"error: {error}", file=sys.stderr)

    run["results"] = reporter.results
    if absent := {result["absent"] for result in reporter.results if "absent" in result}:
        print(f"absent: {'; '.join(sorted(absent))}")
    if options.compare is not None:
        print(reporting.comparison(options.compare, run))
    if options.save is not None:
        reporting.write(options.save, run)
        print(f"saved {options.save}")
    if options.plot:
        figure = IMAGES / f"bench_{options.device}.png"
        reporting.plot(run, figure)
        print(f"drew {figure}")
    wrong = any("wrong" in result for result in reporter.results)
    return 1 if wrong or reporter.errors else 0
