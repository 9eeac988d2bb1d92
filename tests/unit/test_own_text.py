"""Steps on the model's own text (sequence-level unlikelihood): where they go on from, and who rests in them."""

from types import SimpleNamespace

import pytest
import torch

from ds_stability import stability as stability_module
from ds_stability.config import StabilityConfig
from ds_stability.effect import Effect
from ds_stability.errors import StabilityConfigError
from ds_stability.objectives.build import prefixes
from ds_stability.objectives.rows import micro_batch
from ds_stability.stability import Stability


def test_own_text_goes_on_from_text_and_not_from_padding():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 0, 0, 0], [0, 0, 4, 5, 6, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    batch = micro_batch({"input_ids": ids, "attention_mask": mask})
    assert prefixes(batch, None, 5).tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 6]]  # the shortest row has 3 tokens
    assert prefixes(batch, None, 2).tolist() == [[1, 2], [1, 2], [4, 5]]
    labels = torch.tensor([[-100, 2, 3, 4, -100, 5], [1, 2, -100, -100, -100, -100], [-100] * 6])
    plain = micro_batch({"input_ids": ids})  # no mask: what stands behind the last label is padding, or never trained on
    assert prefixes(plain, labels, 5).tolist() == [[1, 2], [1, 2], [0, 0]]  # the last row has no label and counts as whole
    assert prefixes(plain, ids, 9).tolist() == ids.tolist()


def test_a_loop_that_would_only_train_on_own_text_is_refused():
    own = {"objective": {"name": "unlikelihood_sequence", "max_new_tokens": 4, "probability": 1}}
    for block, who in (({"controller": {"mode": "governor"}}, "the governor"), ({"level": 0.5}, "feedback at a level above 0")):
        with pytest.raises(StabilityConfigError, match=f"objective.probability: 1.0 is not allowed; must be below 1 with {who}"):
            StabilityConfig.parse({**own, **block})
        own_half = {"objective": {**own["objective"], "probability": 0.5}}
        assert StabilityConfig.parse({**own_half, **block}).active
    assert not StabilityConfig.parse(own).active
    assert StabilityConfig.parse({**own, "level": 0.5, "stabilizers": {"clipping": {}}}).active  # acts on gradients


@pytest.mark.parametrize("own_text", [True, False])
def test_the_governor_stands_still_in_steps_on_own_text(monkeypatch, own_text):
    updated = []

    class Part:
        warning = "saturated"

        def __init__(self, name):
            self.name = name

        def metrics(self):
            return {}

        def update(self, sums):
            updated.append(self.name)

    stability, warned = object.__new__(Stability), []
    stability.own_text, stability.governance, stability.recorder, stability.ema = own_text, Part("governance"), None, None
    stability.stabilizers = {"governance": stability.governance, "clipping": Part("clipping")}
    stability.effect = Effect(StabilityConfig())
    stability.started, stability.applied_steps, stability.skipped_steps, stability.skipped_in_a_row = 0.0, 0, 0, 0
    stability.measures = SimpleNamespace(update=lambda sums: None, metrics=dict)
    stability.config = SimpleNamespace(max_skipped_steps=10)
    sums = {"stop_requests": 0}
    monkeypatch.setattr(Stability, "_step_metrics", lambda self, sums, elapsed: {})
    monkeypatch.setattr(Stability, "_prepare", lambda self: None)
    monkeypatch.setattr(Stability, "_publish", lambda self: None)
    monkeypatch.setattr(stability_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(stability_module.logger, "warning", warned.append)
    stability.finish(sums, applied=True)
    assert updated == (["clipping"] if own_text else ["governance", "clipping"])
    assert stability.applied_steps == 1 and warned == ([] if own_text else ["saturated"])
