"""For measuring: names that profilers show, and what was measured on this machine."""
