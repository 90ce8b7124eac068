"""The operators of the cache as TensorIR, one file each: mathematics only, nothing about threads.

Every factory takes a `KernelKey` and returns a PrimFunc; the names of its blocks are the contract
with the schedule of the same stem under `kivi_tvm.schedules`.
"""
