"""What a network begins with, other than random numbers: a linear autoencoder, or the weights of another model."""
