"""The study of the compression factor (Rombach et al. 2022, section 4.1): trials, their report, their cost."""
