"""Files on disk: atomic writes, resume state, results.jsonl, and the log of runs.

Imports `errors` only; never torch.
"""
