import pytest
import torch

from iwm_ray.model.encoder import sincos_positions
from iwm_ray.model.segmentation_heads import LinearSegmentation, PyramidSegmentation, to_map


def test_a_token_becomes_the_patch_at_its_row_and_column():
    tokens = torch.arange(6.0)[None, :, None]
    assert to_map(tokens, (2, 3))[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("kind", [LinearSegmentation, PyramidSegmentation])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (8, 8)])
def test_logits_are_on_the_grid(kind, grid):
    head = kind(16, 5, grid).eval()
    assert head(torch.randn(2, grid[0] * grid[1], 16)).shape == (2, 5, *grid)


def test_the_linear_head_reads_each_patch_alone_and_the_pyramid_all():
    tokens = torch.randn(1, 16, 8)
    other = tokens.clone()
    other[:, 15] += 5
    for kind, far in ((LinearSegmentation, False), (PyramidSegmentation, True)):
        head = kind(8, 3, (4, 4)).eval()
        changed = (head(tokens) - head(other)).abs().amax(1)[0] > 1e-7
        assert bool(changed[3, 3]) and bool(changed[0, 0]) == far


def test_narrower_positions_have_the_same_extent():
    known = sincos_positions((4, 4), 16)
    spread = sincos_positions((12, 12), 16, spacing=1 / 3)
    # The middle one of each three lies where the known one does.
    middle = spread.reshape(12, 12, 16)[1::3, 1::3].reshape(16, 16)
    torch.testing.assert_close(middle, known)
