import torch

from iwm_ray.batch import Batch


def batch(count):
    return Batch(
        source=torch.arange(count * 12, dtype=torch.uint8).reshape(count, 3, 2, 2),
        target=torch.zeros(count, 3, 2, 2, dtype=torch.uint8),
        action=torch.arange(count * 7.0).reshape(count, 7),
        context_idx=torch.zeros(count, 3, dtype=torch.int64),
        target_idx=torch.ones(count, 1, dtype=torch.int64),
        weight=torch.ones(count),
        counter=torch.arange(count),
    )


def test_parts_of_a_batch_are_its_rows_in_order():
    whole = batch(6)
    parts = whole.split(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    for name in ("source", "action", "counter"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_moving_changes_nothing():
    whole = batch(2)
    moved = whole.to("cpu")
    assert torch.equal(moved.source, whole.source)
    assert moved.counter.dtype == torch.int64
