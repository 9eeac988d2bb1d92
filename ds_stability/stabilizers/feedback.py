"""Feedback: token weights that hold the variance ratio of surprisal at 1 - level (design section 3)."""

from ds_stability.controller import FeedbackController


class Feedback:
    """Hands the controller's setting to the loss. Level 0 throughout (observation) keeps the gain at 0."""

    def __init__(self, controller: FeedbackController):
        self.controller = controller

    def prepare(self, step, loss):
        loss.setting = self.controller.setting

    def update(self, sums):
        self.controller.update(sums)

    def metrics(self):
        state, setting = self.controller.state, self.controller.setting
        return {
            "stability/level": self.controller.level,
            "stability/target_ratio": 1.0 - self.controller.level,
            "stability/gain": setting.gain,
            "stability/mu": setting.mu if state.moment_steps else None,
            "stability/sigma": setting.sigma if state.moment_steps else None,
            "stability/mean_weight": setting.mean_weight,
            "stability/trim": state.trim,
            "stability/saturated": int(state.saturated),
        }

    def state_dict(self):
        return self.controller.state_dict()

    def load_state_dict(self, state):
        self.controller.load_state_dict(state)
