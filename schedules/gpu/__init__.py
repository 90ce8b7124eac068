"""Schedules for work-groups of threads."""
