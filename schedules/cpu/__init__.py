"""Schedules for CPUs: SIMD lanes and threads."""
