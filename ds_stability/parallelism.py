"""Refusing engines whose ranks are not all data-parallel copies of one model.

Statistics are summed over ranks as if each had sequences and a slice of every gradient of its own. Tensor, expert, sequence
and pipeline parallelism break that. What a DeepSpeed JSON says of them is refused before the engine is built
(`deepspeed_config.py`); this module looks at the engine, which also knows what came as an argument (`mpu`, `mesh_param`) or
lies in the model.
"""

from deepspeed import comm as dist

from ds_stability.errors import StabilityConfigError


def require_data_parallelism(engine) -> None:
    """Raises StabilityConfigError, on every rank, unless each process trains the whole model on sequences of its own."""
    copies = dist.get_world_size(group=engine.seq_data_parallel_group)
    found = {
        "pipeline stages": engine.pipeline_parallelism,
        f"tensor parallelism over {engine.mp_world_size} ranks": engine.mp_world_size > 1,
        f"sequence parallelism over {engine.sequence_parallel_size} ranks": engine.sequence_parallel_size > 1,
        "expert layers of DeepSpeed (deepspeed.moe, AutoEP)": engine.has_moe_layers,
        f"a data-parallel group of {copies} of {dist.get_world_size()} ranks": copies != dist.get_world_size(),
    }
    for name, present in found.items():
        if present:
            raise StabilityConfigError(
                f"the engine has {name}, which does not work with ds_stability yet; train with data parallelism alone (ZeRO), or use "
                "plain deepspeed.initialize"
            )
