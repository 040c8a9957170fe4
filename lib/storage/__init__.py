"""What is on disk: atomic writes, resume state, results.jsonl, the log of runs.

May import `errors`; never torch.
"""
