"""Whether the state in a checkpoint fits the model and the optimizer of a run. Kernels do not check it: the fused AdamW
would write past the end of a state of another shape."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Adam, Optimizer

# Optimizer states with one number for a whole parameter.
NUMBERS = ("step", "eta", "mu")


def other_weights(module: nn.Module, given: dict[str, Tensor]) -> str | None:
    """Names the first given weight whose shape or dtype is not the module's; None if all fit."""
    own = module.state_dict()
    for name, value in given.items():
        if isinstance(value, Tensor) and isinstance(own.get(name), Tensor) and kind(value) != kind(own[name]):
            return f"{name} is {told(value)} in the checkpoint and {told(own[name])} in the model"
    return None


def other_optimizer(optimizer: Optimizer, given: dict[str, Any]) -> str | None:
    """Says in what a given state does not fit the optimizer's parameters; None if it fits."""
    sizes, own = ([len(group["params"]) for group in each["param_groups"]] for each in (given, optimizer.state_dict()))
    if sizes != own:
        return f"its optimizer has {sizes} parameters in its groups, that of this run {own}"
    for number, (group, mine) in enumerate(zip(given["param_groups"], optimizer.param_groups, strict=True)):
        options = {name: value for name, value in mine.items() if type(value) in (int, float, tuple, list)}
        if missing := options.keys() - group.keys():
            return f"its optimizer is another: its groups have no {', '.join(sorted(missing))}"
        if why := unlike(group, {**options, "params": []}, f"param_groups[{number}] of its optimizer"):
            return why
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in given["param_groups"] for number in group["params"]]
    states = {number: state for number, state in given["state"].items() if state}
    if unknown := states.keys() - set(numbers):
        return f"its optimizer has a state of parameter {min(unknown, key=str)}, which there is not"
    # Other optimizers have states of other shapes, and check these when they load them.
    if not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, LBFGS | Adafactor):
        return None
    names = set().union(*states.values())
    if states and isinstance(optimizer, Adam):  # and AdamW
        maxima = {"max_exp_avg_sq"} if any(group["amsgrad"] for group in given["param_groups"]) else set()
        names |= {"step", "exp_avg", "exp_avg_sq"} | maxima
    for number, parameter in zip(numbers, parameters, strict=True):
        for name in sorted(names) if number in states else ():
            if name not in states[number]:
                return f"its optimizer has no {name} of parameter {number}"
            if why := _other_state(name, states[number][name], parameter):
                return f"{name} of parameter {number} in its optimizer {why}"
    return None


def _other_state(name: str, value: Any, parameter: Tensor) -> str | None:
    if name in NUMBERS:
        count = value.numel() if isinstance(value, Tensor) else isinstance(value, int | float)
        return None if count == 1 else f"must be one number; got {told(value)}"
    if value is None and name == "momentum_buffer":
        return None
    if not isinstance(value, Tensor) or kind(value) != kind(parameter):
        return f"is {told(value)}; the parameter is {told(parameter)}"
    return None


def unlike(given: Any, own: Any, name: str) -> str | None:
    """Says where a value from JSON or a `state_dict` has another form than the run's own value; None if nowhere. In the
    place of None any value fits."""
    number = (int, float)
    if own is None or (type(given) in number and type(own) in number) or (given is None and own == {}):
        return None
    if isinstance(own, Tensor) and isinstance(given, Tensor):
        return None if kind(given) == kind(own) else f"{name} is {told(given)}; want {told(own)}"
    if isinstance(own, list | tuple) and isinstance(given, list | tuple):
        if own and len(given) != len(own):
            return f"{name} has {len(given)} values; want {len(own)}"
        parts = [(each, mine, f"{name}[{index}]") for index, (each, mine) in enumerate(zip(given, own, strict=False))]
    elif isinstance(own, dict) and isinstance(given, dict):
        parts = [(given[key], mine, f"{name}.{key}") for key, mine in own.items() if key in given]
    elif type(given) is type(own):
        return None
    else:
        return f"{name} is {told(given)}; want {told(own)}"
    return next((why for part in parts if (why := unlike(*part)) is not None), None)


def kind(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


def told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
