"""What is checked at a network's door, beside input_checks.py: added conditions, residuals, numbers of heads."""
