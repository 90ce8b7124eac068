"""Pruned MetaSchedule records, one directory per target. Read with `importlib.resources`."""
