"""DeepSpeed configs with a stability block: zero*.json for transformers' Trainer, loop_*.json for plain loops."""
