"""What is optimized, per token: cross-entropy and its alternatives, under the same weights, statistics and engine.

An objective is a function (logits_CV fp32, labels_C) -> loss_C in nats; the token weights multiply it. One that needs more
than logits and labels (the tokens before, a reference model) is made anew for each micro-batch, as a `RowObjective`.
`build.py` turns the block's `objective` into one. Importing this package is cheap; its modules import torch.
"""
