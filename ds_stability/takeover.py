"""What a branch takes over from the stability state of its trunk, which may have had another block.

What was measured goes on: counts of steps, the surprisal's moments and histogram, the gradient norm's moments, the gradient's
running mean, the stability measures. What was steered goes on only under the settings that steered it: the feedback loop's trim,
the governor, the average of the weights, the alarm. The rest starts at the branch point: a governor's "initial" is what it
measures there, `init_decay` pulls to the weights there, an average begins with them. Steps are counted on: warm-ups, ramps
and schedules that lie behind do not come again.
"""

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
CLIPPING, GOVERNOR = "clipping, after a warm-up", "the governor"
MOMENTS = ("tokens", "surprisal", "surprisal_sq", "histogram")  # controller.SurprisalState, which imports numpy


@dataclass
class Takeover:
    """A state for the branch's block.

    Attributes:
        state: as `Stability.load_state_dict` takes it.
        settle: stabilizers whose setting of the coming step is still to be chosen.
        tensors: kinds of per-rank tensors that go on (checkpoint.py: "mean", "initial", "average").
        anew: what starts at the branch point, in words.
    """

    state: Json
    settle: list[str]
    tensors: set[str]
    anew: list[str]


def take_over(old: Json, block: Json, fresh: dict[str, Json]) -> Takeover:
    """The state `old` of a checkpoint, made to fit.

    Args:
        old: state of the trunk, with its resolved block under "config". block: the branch's resolved block.
        fresh: the state that each stabilizer of the branch has before its first step, by name.
    """
    before = old["config"]
    result = Takeover({**old, "config": block}, [], set(), [])
    moments = _moments(old)
    result.state["stabilizers"] = {
        name: _STABILIZERS[name](old, block, state, moments, result) for name, state in fresh.items()
    }
    if before.get("ema") is not None and before["ema"] == block.get("ema"):
        result.tensors.add("average")
    elif block.get("ema") is not None:
        result.state["ema"] = {"updates": 0}
        result.anew.append("the average of the weights (ema)")
    if _differs(before, block, "alarm", "probe"):
        result.state["alarm"] = None
    if _differs(before, block, "statistics"):  # sums of an update that another interval has left waiting
        result.state["update_meter"] = [0.0] * len(old["update_meter"])
    return result


def _differs(old: Json, new: Json, *sections: str) -> bool:
    return any(old.get(section) != new.get(section) for section in sections)


def _family(block: Json, name: str) -> Json | None:
    return block["stabilizers"].get(name)


def _moments(old: Json) -> Json:
    """The smoothed surprisal of a trunk with feedback or with a governor: sums with their own count, whatever their decay."""
    parts = old["stabilizers"]
    return parts["governance"]["surprisal"] if "governance" in parts else {name: parts["feedback"][name] for name in MOMENTS}


def _feedback(old: Json, block: Json, fresh: Json, moments: Json, result: Takeover) -> Json:
    before = old["config"]
    same = _family(before, "feedback") == _family(block, "feedback") and not _differs(before, block, "controller")
    if same and "feedback" in old["stabilizers"]:
        return old["stabilizers"]["feedback"]
    result.settle.append("feedback")
    if "feedback" in old["stabilizers"]:
        result.anew.append("the trim of the feedback loop")
    return fresh | moments | {"applied_steps": old["applied_steps"]}


def _governance(old: Json, block: Json, fresh: Json, moments: Json, result: Takeover) -> Json:
    if "governance" in old["stabilizers"] and not _differs(old["config"], block, "controller"):
        return old["stabilizers"]["governance"]
    result.settle.append("governance")
    result.anew.append(GOVERNOR)
    governor = fresh["governor"] | {"applied_steps": old["applied_steps"]}
    return fresh | {"governor": governor, "surprisal": fresh["surprisal"] | moments}


def _clipping(old: Json, block: Json, fresh: Json, moments: Json, result: Takeover) -> Json:
    before = _family(old["config"], "clipping")
    if "clipping" in old["stabilizers"] and before["ema_decay"] == _family(block, "clipping")["ema_decay"]:
        return old["stabilizers"]["clipping"]
    result.anew.append(CLIPPING)
    return fresh


def _averaging(old: Json, block: Json, fresh: Json, moments: Json, result: Takeover) -> Json:
    if "averaging" in old["stabilizers"]:
        result.tensors.add("mean")
        return old["stabilizers"]["averaging"]
    result.anew.append("averaging of the gradient")
    return fresh


def _regularization(old: Json, block: Json, fresh: Json, moments: Json, result: Takeover) -> Json:
    if _family(block, "regularization")["kind"] == "init_decay":
        before = _family(old["config"], "regularization")
        if "regularization" in old["stabilizers"] and before["kind"] == "init_decay":
            result.tensors.add("initial")
        else:
            result.anew.append("init_decay, which pulls to the weights of the branch point")
    return fresh


_STABILIZERS = {"feedback": _feedback, "governance": _governance, "clipping": _clipping, "averaging": _averaging,
                "regularization": _regularization}  # fmt: skip
