"""A finished model's figures: samples against a collection, composed scenes, autoencoders."""
