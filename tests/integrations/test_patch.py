"""The mechanism that puts our functions in place of another project's, on a project made up for it."""

import importlib
import inspect
import os
import signal
import sys
import threading

import pytest

from rlkernels.integrations import _patch
from rlkernels.integrations._patch import Patch, PatchError, Replacement

FILES = {
    "__init__.py": "",
    "losses.py": """
        REGISTRY = {}

        def scale(x, factor=2.0):
            return x * factor
        REGISTRY["scale"] = scale

        def shift(x: int, *, by: int = 1) -> int:
            return x + by

        class Loss:
            def __init__(self, weight):
                self.weight = weight

            def forward(self, x):
                return x * self.weight

        class Base:
            @classmethod
            def apply(cls, *args):
                return cls.forward(None, *args)

        class Function(Base):
            @staticmethod
            def forward(ctx, x, temperature=1.0):
                return x / temperature
    """,
    "trainer.py": """
        from .losses import Function as _Function, scale, shift as _shift

        def step(x):
            return scale(_shift(_Function.apply(x, 1.0)))
    """,
    "inherited.py": """
        from .losses import Loss

        class Weighted(Loss):
            pass
    """,
    "late.py": "from .losses import scale",
    "serving.py": "import a_package_that_nobody_has",
}


def scale(x, factor=2.0):
    return ("scale", x, factor)


def shift(x, *, by=1):
    return ("shift", x, by)


def forward(self, x):
    return ("forward", self.weight, x)


def apply(x, temperature=1.0):
    return ("apply", x, temperature)


def serve():
    raise AssertionError("never called")


SCALE = Replacement("peer.losses:scale", scale, "(x, factor=2.0)")
ROWS = (
    SCALE,
    Replacement("peer.losses:shift", shift, "(x, *, by=1)"),
    Replacement("peer.losses:Loss.forward", forward, "(self, x)"),
    Replacement("peer.losses:Function.apply", apply, "(ctx, x, temperature=1.0)", signature_of="Function.forward"),
    Replacement("peer.serving:serve", serve, "()"),
    Replacement("peer.losses:gone", serve, "()", versions="<1"),
)


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A package `peer` 1.2.3, and its modules as far as they are imported."""
    folder = tmp_path / "peer"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(inspect.cleandoc(text))
    info = tmp_path / "peer-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peer\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("peer.trainer")
    for name in [name for name in sys.modules if name.split(".")[0] == "peer"]:
        del sys.modules[name]


@pytest.fixture
def losses(peer):
    return importlib.import_module("peer.losses")


def state(peer):
    """Every name and registered function of the package, by identity."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "peer"]
    found = {(m.__name__, name): value for m in modules for name, value in vars(m).items() if name[0] != "_"}
    for name in ("Loss", "Base", "Function"):
        found |= {(name, key): value for key, value in vars(vars(sys.modules["peer.losses"])[name]).items()}
    return found | {("REGISTRY", key): value for key, value in sys.modules["peer.losses"].REGISTRY.items()}


def test_replaces_functions_methods_aliases_and_registries(peer, losses):
    patch = Patch("peer", ">=1,<2", ROWS)
    before = state(peer)
    assert peer.step(3) == 8
    patch.patch()
    assert losses.scale(1) == peer.scale(1) == losses.REGISTRY["scale"](1) == ("scale", 1, 2.0)
    assert peer._shift(1, by=5) == ("shift", 1, 5)
    assert losses.Loss(7).forward(1) == ("forward", 7, 1)
    assert losses.Function.apply(4, 2.0) == peer._Function.apply(4, 2.0) == ("apply", 4, 2.0)
    assert peer.step(3) == ("scale", ("shift", ("apply", 3, 1.0), 1), 2.0)
    assert patch.original("peer.losses:scale")(3) == 6
    assert patch.original("peer.losses:Function.apply")(3, 2.0) == 1.5
    patch.unpatch()
    assert state(peer) == before
    assert peer.step(3) == 8
    assert patch.original("peer.losses:scale") is losses.scale


def test_module_imported_while_patched_is_put_back_too(peer, losses):
    patch = Patch("peer", ">=1,<2", ROWS)
    original = losses.scale
    patch.patch()
    late = importlib.import_module("peer.late")
    assert late.scale is scale
    patch.unpatch()
    assert late.scale is original


def test_twice_is_once(peer):
    patch = Patch("peer", ">=1,<2", ROWS)
    before = state(peer)
    patch.patch()
    patched = state(peer)
    patch.patch()
    assert state(peer) == patched
    patch.unpatch()
    assert state(peer) == before
    patch.unpatch()
    assert state(peer) == before


def test_block_leaves_what_it_found(peer, losses):
    patch = Patch("peer", ">=1,<2", ROWS)
    before = state(peer)
    with patch.patched(), pytest.raises(ZeroDivisionError), patch.patched():
        assert losses.scale is scale
        raise ZeroDivisionError
    assert state(peer) == before
    patch.patch()
    with patch.patched():
        pass
    assert losses.scale is scale
    with patch.patched():
        patch.unpatch()
        assert losses.scale is scale
    assert state(peer) == before


def test_blocks_of_many_threads(peer, losses):
    """Each sees our function throughout its block, and the last to leave puts theirs back."""
    patch = Patch("peer", ">=1,<2", ROWS)
    before = state(peer)
    barrier = threading.Barrier(8)
    wrong = []

    def work():
        barrier.wait()
        for _ in range(200):
            with patch.patched():
                if losses.scale is not scale or peer.scale is not scale:
                    wrong.append("not replaced")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert state(peer) == before


def test_inherited_method(peer, losses):
    inherited = importlib.import_module("peer.inherited")
    patch = Patch("peer", ">=1,<2", (Replacement("peer.inherited:Weighted.forward", forward, "(self, x)"),))
    with patch.patched():
        assert inherited.Weighted(7).forward(1) == ("forward", 7, 1)
        assert losses.Loss(7).forward(1) == 7
    assert inherited.Weighted(7).forward(1) == 7
    assert "forward" not in vars(inherited.Weighted)


def test_one_function_for_two(peer, losses):
    late = importlib.import_module("peer.late")
    patch = Patch("peer", ">=1,<2", (SCALE, Replacement("peer.losses:Loss.forward", scale, "(self, x)")))
    before = state(peer)
    with patch.patched():
        assert late.scale(1) == ("scale", 1, 2.0)
        assert losses.Loss(7).forward(1)[2] == 1
    assert state(peer) == before


def test_what_the_project_had_of_ours_stays(peer, losses):
    """As in a registry of plugins, under a name of its own."""
    losses.REGISTRY["ours"] = scale
    patch = Patch("peer", ">=1,<2", ROWS)
    before = state(peer)
    with patch.patched():
        assert losses.REGISTRY["scale"] is losses.REGISTRY["ours"] is scale
    assert state(peer) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_child_of_a_process_that_was_patching(peer, losses):
    patch = Patch("peer", ">=1,<2", ROWS)
    held, done = threading.Event(), threading.Event()

    def hold():
        with _patch._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        patch.patch()
        os._exit(losses.scale is not scale)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            Replacement("peer.losses:shift", shift, "(x, by=1)"),
            r"peer\.losses:shift has the signature \(x, \*, by=1\), where \(x, by=1\)",
        ),
        (Replacement("peer.losses:shift", shift, "(x, *, by=2)"), r"shift has the signature"),
        (Replacement("peer.losses:gone", shift, "()"), r"peer\.losses:gone is not there"),
        (Replacement("peer.losses:Loss.backward", shift, "()"), r"peer\.losses:Loss\.backward is not there"),
        (Replacement("peer.elsewhere:shift", shift, "()"), r"peer\.elsewhere:shift is not there"),
        (
            Replacement("peer.losses:Function.apply", apply, "(ctx, x)", signature_of="Function.forward"),
            r"Function\.forward has",
        ),
    ],
)
def test_anything_that_differs_is_named_and_nothing_changes(peer, losses, row, message):
    patch = Patch("peer", ">=1,<2", (*ROWS, row))
    before = state(peer)
    with pytest.raises(PatchError, match=message):
        patch.patch()
    with pytest.raises(PatchError, match="nothing was replaced"), patch.patched():
        raise AssertionError("entered")
    patch.unpatch()
    assert state(peer) == before


def test_every_difference_is_named(peer):
    rows = (Replacement("peer.losses:gone", scale, "()"), Replacement("peer.losses:scale", scale, "(x)"))
    with pytest.raises(PatchError, match=r"losses:gone.*losses:scale"):
        Patch("peer", ">=1,<2", rows).patch()


def test_other_versions_are_refused(peer, losses):
    with pytest.raises(PatchError, match=r"peer 1\.2\.3 is installed, and rlkernels knows peer>=2"):
        Patch("peer", ">=2", ROWS).patch()
    assert losses.scale(1) == 2.0


def test_package_that_is_not_installed(peer):
    with pytest.raises(ModuleNotFoundError, match="nobody is not installed"):
        Patch("nobody", ">=1", ROWS).patch()
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        Patch("peer", ">=1", (ROWS[4],)).patch()


def test_error_half_way_puts_everything_back(peer, losses, monkeypatch):
    patch = Patch("peer", ">=1,<2", ROWS)
    before = state(peer)
    exchange = patch._exchange
    calls = []

    def interrupted(others):
        calls.append(others)
        exchange(others)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(patch, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.patch()
    assert len(calls) == 2
    assert state(peer) == before


def test_verbose_prints_what_was_replaced(peer, capsys):
    patch = Patch("peer", ">=1,<2", ROWS)
    with patch.patched(verbose=True):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "peer 1.2.3: 4 functions replaced by rlkernels"
    assert lines[1].split() == ["peer.losses:scale", f"{__name__}.scale"]
    assert lines[-1].split(maxsplit=1) == [
        "peer.serving:serve",
        "left as it is: a_package_that_nobody_has is not installed",
    ]
    patch.patch()
    assert capsys.readouterr().out == ""
    patch.patch(verbose=True)
    assert capsys.readouterr().out.splitlines() == lines


def test_table_that_cannot_be_printed_puts_everything_back(peer, monkeypatch):
    patch = Patch("peer", ">=1,<2", ROWS)
    before = state(peer)
    monkeypatch.setattr(patch, "table", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), patch.patched(verbose=True):
        raise AssertionError("entered")
    assert state(peer) == before
