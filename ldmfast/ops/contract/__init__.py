"""The two numerical contracts, `fast` and `exact`: the switch, and what `exact` makes of PyTorch's own operations."""
