"""In how many of transformers' causal LM classes is the head recognized, so that the linear loss can be computed in it?

    python benchmarks/heads.py

Every class is built on the meta device from its own default config; those that cannot be are left out. Prints the counts, and
the reason for each class that takes the loss from its logits.
"""

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_stability.fused_head import UnknownHead, find_transform


def main() -> int:
    transformers.logging.set_verbosity_error()
    recognized, reasons, unbuilt = [], {}, []
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        try:
            config = AutoConfig.for_model(kind)
            with torch.device("meta"):
                model = getattr(transformers, name)(config)
        except Exception:  # a default config is not always enough, and may fail in any way
            unbuilt.append(name)
            continue
        try:
            find_transform(model)
            recognized.append(name)
        except UnknownHead as reason:
            reasons[name] = str(reason)
    print(f"{len(recognized)} of {len(recognized) + len(reasons)} classes recognized, {len(unbuilt)} not built from their default config")
    for name, reason in reasons.items():
        print(f"{name}: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
