"""Figures of merit: of a reconstruction against its original, and of one set of pictures against another."""
