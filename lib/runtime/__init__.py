"""The machine: devices, memory, batches, processes.

May import `errors`.
"""
