"""What is on disk: atomic writes, resume state, results.jsonl, the log of runs.

Imports `errors` only; never torch.
"""
