"""One of the two DDP workers of test_loop.py: `two_workers.py FOLDER RANK` writes FOLDER/RANK-PARTS.pt."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ToyRun

from iwm_ray.batch import Batch
from iwm_ray.training.loop import train_step

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
toy = ToyRun()
for num_parts in (1, 2):
    state = toy.state(toy.config(runtime={"num_workers": 2, "accumulation_steps": num_parts}))
    forward = DistributedDataParallel(state.model, broadcast_buffers=False)
    shares = [toy.batch(step).split(2)[rank] for step in range(6)]
    losses = [train_step(state, share, forward).read()["loss"] for share in shares[:4]]
    weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    if rank == 1:
        shares[4] = Batch(**{**vars(shares[4]), "weight": torch.full((4,), 3e38)})
    train_step(state, shares[4], forward)
    unchanged = all(torch.equal(weights[name], tensor) for name, tensor in state.model.state_dict().items())
    skipped = state.skipped.tolist()
    train_step(state, shares[5], forward)
    skipped += state.skipped.tolist()
    saved = {"losses": losses, "weights": weights, "unchanged": unchanged, "skipped": skipped}
    torch.save(saved, folder / f"{rank}-{num_parts}.pt")
distributed.destroy_process_group()
