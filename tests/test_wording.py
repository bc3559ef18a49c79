import pytest

from iwm_ray.wording import counted


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 seeds"), (1, "1 seed"), (1.0, "1 seed"), (0.5, "0.5 seeds"), (36, "36 seeds")]
)
def test_one_is_not_several(count: float, words: str) -> None:
    assert counted(count, "seed") == words
