import numpy as np

from iwm_ray.config import ViewsConfig
from iwm_ray.pictures.words import action_words, amount
from iwm_ray.views.policy import ViewPolicy

SCHEMA = ViewPolicy.from_config(ViewsConfig()).schema


def test_an_action_is_written_in_physical_units() -> None:
    action = np.array([0.8, 0, 0, -0.5, 0, 1, 0], np.float32)
    assert action_words(action, SCHEMA) == ["brightness +0.32", "hue −0.05 turns", "undo blur"]


def test_the_null_action_does_nothing() -> None:
    assert action_words(np.zeros(7, np.float32), SCHEMA) == ["nothing"]


def test_flags_are_yes_or_no() -> None:
    assert [amount(value, SCHEMA[4]) for value in (1.0, 0.0)] == ["yes", "no"]
