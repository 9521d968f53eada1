"""What is called of a device besides our own kernels, seen under a TorchDispatchMode."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "slice"),
    *("select", "alias", "detach", "as_strided", "unbind", "_reshape_alias", "split", "movedim"),
}
"""Memory and views: nothing runs on the device."""
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_to_copy_to_cpu", "unique", "masked_select"}
"""The host waits for a number of the device."""


class Seen(TorchDispatchMode):
    """Notes what runs in PyTorch's name, and in ours. Memory is not filled, which would be a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.waited: list[str] = []
        self.own: list[str] = []
        self.launches = 0  # of CUDA kernels, where the emulation counts them
        self._filled = torch.utils.deterministic.fill_uninitialized_memory

    def __enter__(self) -> "Seen":
        torch.utils.deterministic.fill_uninitialized_memory = False
        return super().__enter__()

    def __exit__(self, *raised) -> None:
        super().__exit__(*raised)
        torch.utils.deterministic.fill_uninitialized_memory = self._filled

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        kind = name.rpartition("::")[2]
        if name.startswith("rlkernels::"):
            self.own.append(kind)
        elif kind not in NO_LAUNCH:
            self.launched.append(kind)
        if kind in WAITS:
            self.waited.append(kind)
        return function(*args, **(kwargs or {}))
