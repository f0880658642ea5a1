"""The training stages (train_*.py), and the engine, inputs and losses that they share.

Import the module you need (`ldmfast.training.train_denoiser`, ...); this package itself imports nothing heavy.
"""
