"""Files that a run writes for people: curves.png, and helpers that write any such file without risk to the run.

Every trainer adds `CurvesCallback`; `rollouts.completions` and `reference_cache` use the helpers.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The panels of curves.png: title -> names under which trainers log the panel's metric.
ONLINE = {
    "reward": ("reward",),
    "KL to the reference": ("kl", "objective/kl"),
    "tokens per completion": ("completions/mean_length",),
    "entropy": ("entropy", "policy/entropy_avg"),
}
OFFLINE = {
    "loss": ("loss",),
    "accuracy": ("accuracy", "rewards/accuracies", "mean_token_accuracy"),
    "margin": ("margin", "rewards/margins"),
}


@contextlib.contextmanager
def written_aside(file: Path) -> Iterator[Path]:
    """Yields a path in the folder of `file` to write to, and renames it to `file` at the end. An interrupted run thus
    leaves no incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.unfinished")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def warned_of(file: Path) -> Iterator[None]:
    """Turns an OSError while `file` is written, as on a full disk, into a warning."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{file} could not be written: {error.strerror or error}")


def missing(package: str, what: str) -> bool:
    """Whether a package is not installed. If so, warns that there will be `what`, such as "no curves.png"."""
    if find_spec(package) is not None:
        return False
    logger.warning(f"{package} is not installed, so there is {what}: pip install {package}")
    return True


class CurvesCallback(TrainerCallback):
    """Draws the logged metrics as curves.png in the output folder when the run ends."""

    def __init__(self) -> None:
        self.draws = not missing("matplotlib", "no curves.png")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.draws and state.is_world_process_zero:
            file = Path(args.output_dir) / "curves.png"
            with warned_of(file):
                draw_curves(file, state.log_history)


Curve = tuple[list[int], list[float]]  # steps and values


def curves_of(history: list[dict[str, float]], names: tuple[str, ...]) -> dict[str, Curve]:
    """The curves of the metrics `names`, by label: one in training, and one for each evaluation set."""
    curves: dict[str, Curve] = {}
    for entry in history:
        for key, value in entry.items():
            label = label_of(key, names)
            if label and math.isfinite(value):
                steps, values = curves.setdefault(label, ([], []))
                steps.append(int(entry["step"]))
                values.append(value)
    return curves


def label_of(key: str, names: tuple[str, ...]) -> str | None:
    """What the legend calls a logged key, or None if it is none of the metrics `names`."""
    if key in names:
        return "training"
    # With several evaluation sets a key is eval_{set}_{name}.
    found = [name for name in names if key.startswith("eval_") and key.endswith(f"_{name}")]
    return key.removesuffix(f"_{max(found, key=len)}").replace("eval", "evaluation", 1) if found else None


def rewards_of(history: list[dict[str, float]]) -> dict[str, Curve]:
    """The training curve of each reward function, or nothing if there is only one."""
    keys = dict.fromkeys(key for entry in history for key in entry if re.fullmatch("rewards/.*/mean", key))
    curves = {key[len("rewards/") : -len("/mean")]: curves_of(history, (key,))["training"] for key in keys}
    return curves if len(curves) > 1 else {}


def draw_curves(file: Path, history: list[dict[str, float]]) -> None:
    """Draws a panel for each logged metric among reward, KL, length and entropy, or among loss, accuracy and margin."""
    from matplotlib.figure import Figure  # an optional package

    online = any("reward" in entry for entry in history)
    panels = {title: curves_of(history, names) for title, names in (ONLINE if online else OFFLINE).items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return
    columns = len(panels) if len(panels) < 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout="constrained")
    for index, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for label, (steps, values) in curves.items():
            few = label != "training" or len(steps) == 1
            axes.plot(steps, values, "o-" if few else "-", markersize=4, label=label)
        parts = rewards_of(history) if title == "reward" else {}
        for label, (steps, values) in parts.items():
            axes.plot(steps, values, ":", linewidth=1.2, label=label)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if len(curves) + len(parts) > 1:
            axes.legend()
    with written_aside(file) as aside:
        figure.savefig(aside, format="png", dpi=120)
