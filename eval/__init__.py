"""The evaluation harness, separate from training."""
