import multiprocessing
import os

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from iwm_ray.model.batch_norm import BatchNorm

SHAPES = {"vectors": (8, 3), "maps": (8, 3, 2, 5)}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(BatchNorm(3, affine=False), nn.Flatten(), nn.LazyLinear(4), BatchNorm(4))


def batch(kind):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SHAPES[kind], generator=generator) * torch.arange(1, 9).view(
        -1, *[1] * (len(SHAPES[kind]) - 1)
    )


def train(model, forward, values, count):
    """Two steps; the loss is a mean over all workers' rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (forward(values).pow(3).sum() * count / 8).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def part(rank, path, queue, kind):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = network()
    model(batch(kind)[:2])  # makes the lazy layer
    torch.manual_seed(3)
    model[2].reset_parameters()
    model[0].reset_running_stats(), model[3].reset_running_stats()
    values = batch(kind)[rank * 4 : rank * 4 + 4]
    found = train(model, DistributedDataParallel(model, broadcast_buffers=False), values, 2)
    queue.put({name: tensor.numpy() for name, tensor in found.items()})
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", list(SHAPES))
def test_one_worker_has_torchs_own(kind):
    ours, theirs = BatchNorm(3), {"vectors": nn.BatchNorm1d, "maps": nn.BatchNorm2d}[kind](3)
    assert torch.equal(ours(batch(kind)), theirs(batch(kind)))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="needs"):
        ours(torch.zeros(2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SHAPES))
def test_two_workers_have_the_statistics_of_the_whole_batch(kind, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    workers = [spawn.Process(target=part, args=(rank, tmp_path / "meet", queue, kind)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    model = network()
    model(batch(kind)[:2])
    torch.manual_seed(3)
    model[2].reset_parameters()
    model[0].reset_running_stats(), model[3].reset_running_stats()
    expected = train(model, model, batch(kind), 1)
    for theirs in found:
        for name, values in expected.items():
            torch.testing.assert_close(torch.from_numpy(theirs[name]), values, rtol=1e-4, atol=1e-5, msg=name)
