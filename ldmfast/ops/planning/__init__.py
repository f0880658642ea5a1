"""What the plans of the C++ modules (native.py) and of Triton's kernels (triton_plans.py) have in common."""
