"""Runs the CASES of each file: every case on the device, in every implementation, checked and then timed."""

import time

import pytest
import torch

import suite


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.addoption("--op", help="the cases of this op alone")


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    device, op = metafunc.config.getoption("device"), metafunc.config.getoption("op")
    pairs = [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in metafunc.module.CASES
        if op in (None, case.op)
        for name in suite.implementations(case, device)
    ]
    metafunc.parametrize(("case", "implementation"), pairs)


@pytest.fixture
def measure(request, benchmark):
    device = request.config.getoption("device")

    def run(case: suite.Case, implementation: str) -> None:
        result = {"op": case.op, "case": case.name, "implementation": implementation}
        request.node.user_properties.append(("benchmark", result))
        try:
            call = suite.prepare(case, implementation, device)
        except LookupError as error:
            pytest.skip(str(error))
        if benchmark.disabled:
            return

        def timed() -> None:
            call.run()
            suite.synchronize(device)

        call.restore()
        begin = time.perf_counter()
        if case.once:
            peak = suite.peak_bytes(call, device)
            seconds = [time.perf_counter() - begin]
        else:
            timed()
            benchmark.group = case.name
            rounds = suite.rounds(time.perf_counter() - begin)
            benchmark.pedantic(timed, setup=call.restore, rounds=rounds)
            seconds = benchmark.stats.stats.data
            peak = suite.peak_bytes(call, device)
        result |= {
            "rounds": len(seconds),
            **suite.percentiles(seconds),
            "bytes_moved": case.moved,
            "peak_bytes": peak,
            "wanted": case.wanted.get(implementation),
            "gradient_bytes": sum(leaf.nbytes for leaf in call.leaves),
            "bar": suite.bar(case, implementation),
            "most_bytes": case.most_bytes,
            "floor": implementation in case.floors,
        }
        benchmark.extra_info.update(result)

    return run
