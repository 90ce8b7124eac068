"""Tuning records, one directory per target: `kivi_tvm.database` reads and writes them."""
