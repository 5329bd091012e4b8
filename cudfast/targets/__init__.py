"""Calibrations beyond the clip: what may be asked of a target, and the targets themselves."""
