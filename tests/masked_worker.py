"""One process of a group in `test_masked.py`: whitens its part with the others and leaves the result in
`<folder>/<rank>.pt`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rlkernels import masked_whiten
from rlkernels.ops import masked

OPTIONS = {
    "defaults": {},
    "population, mean kept": dict(unbiased=False, shift_mean=False),
    "floor": dict(eps=1e5, eps_floor=True),
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    x, mask = torch.load(folder / "parts.pt")[dist.get_rank()]
    combined = []
    combine = masked.reference.combine_moments
    masked.reference.combine_moments = lambda parts: combined.append(combine(parts)) or combined[-1]
    results = {name: masked_whiten(x, mask, group=dist.group.WORLD, **options) for name, options in OPTIONS.items()}
    torch.save({"options": OPTIONS, "moments": combined[0], **results}, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
