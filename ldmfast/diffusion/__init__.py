"""Noise schedules, objectives and samplers."""
