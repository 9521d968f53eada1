"""gae on few long rows, and on many shorter ones."""

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

import peer_modules
import rlkernels
from suite import Case, Peer, response_mask

SHAPES = [(8, 32768), (64, 8192), (64, 1024)]
GAMMA, LAM = 0.999, 0.95
VERL_BARS = dict(zip(SHAPES, (1000, 500, 200), strict=True))


@cache
def compiled_loop():
    source = Path(__file__).with_name("gae_loop.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "gae_loop.so"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        options = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([*compiler, *options, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).gae
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 2 + [ctypes.c_float] * 2
    function.restype = None

    def gae(rewards, values):
        advantages, returns = torch.empty_like(rewards), torch.empty_like(values)
        function(*(t.data_ptr() for t in (rewards, values, advantages, returns)), *rewards.shape, GAMMA, LAM)
        return advantages, returns

    return gae


def torchrl_gae():
    function = peer_modules.torchrl().vec_generalized_advantage_estimate
    return lambda *inputs: function(GAMMA, LAM, *inputs)


def torchrl_layout(rewards, values):
    """[B, T, 1], the values one step later, and where an episode ends."""
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    done = torch.zeros_like(values, dtype=torch.bool)
    done[:, -1] = True
    return tuple(t.unsqueeze(-1) for t in (values, following, rewards, done, done))


def verl_gae():
    function = peer_modules.verl().compute_gae_advantage_return
    return lambda *inputs: function(*inputs, gamma=GAMMA, lam=LAM)


def verl_layout(rewards, values, mask):
    return rewards, values, mask.float()


def case(shape):
    size = 4 * shape[0] * shape[1]
    return Case(
        "gae",
        shape,
        lambda: (torch.randn(shape), torch.randn(shape)),
        ours=lambda rewards, values: rlkernels.gae(rewards, values, gamma=GAMMA, lam=LAM),
        peers={
            "torchrl": Peer(torchrl_gae, torchrl_layout),
            "C++ loop": Peer(compiled_loop, devices=("cpu",)),
        },
        moved=4 * size,
        # A convolution, which leaves out what has decayed.
        ulps=64,
        wanted={"torchrl": 10, "C++ loop": 2},
    )


def whitened_case(shape):
    size = 4 * shape[0] * shape[1]
    return Case(
        "gae",
        shape,
        lambda: (torch.randn(shape), torch.randn(shape), response_mask(shape)),
        ours=lambda *inputs: rlkernels.gae(*inputs, gamma=GAMMA, lam=LAM, whiten=True),
        peers={"verl": Peer(verl_gae, verl_layout)},
        label="masked, whitened, float32",
        # The advantages are read and written once more when their statistics are known.
        moved=6 * size + size // 4,
        mask=2,
        wanted={"verl": VERL_BARS[shape]},
    )


CASES = [make(shape) for shape in SHAPES for make in (case, whitened_case)]


def test_recurrence(case, implementation, measure):
    measure(case, implementation)
