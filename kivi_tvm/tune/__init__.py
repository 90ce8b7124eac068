"""Tuning: candidates are built, checked against the reference, timed, and the best published."""
