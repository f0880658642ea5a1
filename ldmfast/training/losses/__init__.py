"""What decoded pictures are compared by: reconstruction, perceptual and adversarial terms, KL and codebook."""
