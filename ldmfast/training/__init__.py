"""Training and evaluation: picture collections, the two training stages, checkpoints, metrics.

Import the module you need (`ldmfast.training.denoiser`, ...); this package itself imports nothing heavy.
"""
