"""Other projects' own functions, to test and to time ours against. `make test-peers` installs them in .venv-peers.

Each is loaded by the function named after its project, which raises ModuleNotFoundError where it is not installed.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def verl(module: str = "trainer.ppo.core_algos") -> ModuleType:
    return importlib.import_module(f"verl.{module}")


def torchrl(module: str = "objectives.value.functional") -> ModuleType:
    return importlib.import_module(f"torchrl.{module}")


def liger(module: str = "chunked_loss") -> ModuleType:
    return importlib.import_module(f"liger_kernel.{module}")


def openrlhf(module: str = "models.loss") -> ModuleType:
    """OpenRLHF's packages import DeepSpeed, flash-attn and Ray actors on the way to any of their modules. The modules
    with arithmetic need none of it: their packages stand in empty, and so does what they merely name."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'openrlhf'", name="openrlhf")
    root = Path(spec.origin).parent
    for package in ("models", "trainer", "trainer.ppo_utils", "utils"):
        _stand_in(f"openrlhf.{package}", __path__=[str(root / package.replace(".", "/"))])
    _stand_in("openrlhf.trainer.ray", __path__=[])
    _stand_in("openrlhf.trainer.ray.launcher", RayActorGroup=object)
    installed = "deepspeed" in sys.modules
    _stand_in("deepspeed")
    try:
        return importlib.import_module(f"openrlhf.{module}")
    finally:
        if not installed:  # transformers looks for it too
            del sys.modules["deepspeed"]


def _stand_in(name: str, **attributes) -> None:
    if name not in sys.modules:
        sys.modules[name] = module = ModuleType(name)
        vars(module).update(attributes)
