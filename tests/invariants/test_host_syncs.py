"""No host synchronization before the step ends, and one in it: the copy of the reduced vector.

Everything that would make a GPU's host wait is counted under real ZeRO-3 and compared with plain DeepSpeed, which has some
of its own in a step.
"""

import pytest
import torch
from host_syncs import HostSyncs

FAMILIES = {"feedback": {}, "clipping": {}, "averaging": {}, "regularization": {"kind": "z_loss"}}
CONTROLLED = {"level": 0.5, "stabilizers": FAMILIES, "statistics": {"update_ratio_interval": 1}, "controller": {"warmup_steps": 1}, "ema": {}}
BASE = {"steps": 4, "syncs": True, "high_frequency": None}
RUNS = [
    {"name": "plain", "engine": "plain", **BASE},
    {"name": "stock", "stability": {"level": 0.0, "statistics": {"update_ratio_interval": 1}}, **BASE},
    {"name": "chunked", "stability": CONTROLLED | {"loss_path": "chunked"}, **BASE},
    {"name": "linear", "stability": CONTROLLED, **BASE},
]


@pytest.fixture(scope="module")
def results(trainings):
    return trainings(RUNS)


def ours(places):
    return [place for place in places if any("/ds_stability/" in line for line in place[1])]


@pytest.mark.parametrize("name", ["stock", "chunked", "linear"])
def test_the_host_waits_once_a_step(results, name):
    for micro, (mine, plain) in enumerate(zip(results[name]["syncs"], results["plain"]["syncs"], strict=True)):
        # On a CPU the linear loss leaves masked tokens out, whose number would be a synchronization on an accelerator.
        before = [place for place in mine[0] if "linear_loss.py" not in str(place) or "nonzero" not in place[0]]
        once = micro == 0 and name == "linear"  # the fused head checks the forward that runs, in the first one
        assert len(before) <= len(plain[0]) + once, before
        assert len(mine[1]) <= len(plain[1]) + micro % 2, (mine[1], plain[1])  # the second micro-batch closes the step


def test_the_counter_counts(results):
    with HostSyncs().watching() as syncs:
        value = torch.ones(3)
        value.sum().item()
        bool(value[0] > 0)
        value.cpu()
        value.tolist()
        value.nonzero()
        value * 2.0
    assert len(syncs.places) == 5
    copies = [place for _, inside in results["linear"]["syncs"] for place in inside if "collective.py" in str(place)]
    assert len(copies) == BASE["steps"] and {name for name, _ in copies} == {"cpu"}
