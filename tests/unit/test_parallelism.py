"""Engines whose ranks are not all copies of one model, whatever brought that about (`mpu`, `mesh_param`, layers of the model)."""

from types import SimpleNamespace

import pytest

from ds_stability import parallelism
from ds_stability.errors import StabilityConfigError

PLAIN = {"mp_world_size": 1, "sequence_parallel_size": 1, "has_moe_layers": False, "pipeline_parallelism": False,
         "seq_data_parallel_group": 4}  # fmt: skip
OTHERS = [({"mp_world_size": 2}, "tensor parallelism over 2 ranks"), ({"sequence_parallel_size": 4}, "sequence parallelism over 4"),
          ({"has_moe_layers": True}, "expert layers"), ({"pipeline_parallelism": True}, "pipeline stages"),
          ({"seq_data_parallel_group": 2}, "a data-parallel group of 2 of 4 ranks")]  # fmt: skip


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch):
    """A group is its size."""
    monkeypatch.setattr(parallelism.dist, "get_world_size", lambda group=4: group)


def test_data_parallelism_passes():
    parallelism.require_data_parallelism(SimpleNamespace(**PLAIN))


@pytest.mark.parametrize("change, words", OTHERS)
def test_others_are_one_line(change, words):
    with pytest.raises(StabilityConfigError, match=words) as caught:
        parallelism.require_data_parallelism(SimpleNamespace(**PLAIN | change))
    assert "\n" not in str(caught.value) and "deepspeed.initialize" in str(caught.value)
