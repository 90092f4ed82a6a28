"""Train a robot policy from video first, actions second.

A SmolVLA-like policy with two flow-matching heads on one shared expert: one head learns latent actions, which a frozen
LAQ teacher reads from video without action labels; the other then learns robot actions from a few labels.
Start reading at `config.py` and `batch.py`, then `model.py`. Importing this package imports none of its modules.
"""
