"""What `profile`, `tune` and bench/gpu share: the clock, what is timed, the classes of kernels."""
