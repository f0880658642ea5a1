"""What a GPU's way through a network has of its own: which kernels take in what surrounds them."""
