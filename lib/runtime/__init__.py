"""The machine: devices, memory, batches, processes.

Imports `errors` only.
"""
