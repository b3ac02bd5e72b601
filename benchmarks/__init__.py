"""Measurements of speed. Each is one command, measures both sides in one run, and quotes ratios of medians."""
