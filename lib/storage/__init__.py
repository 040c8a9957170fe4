"""Files on disk: atomic writes, resume state, results.jsonl, and the log of runs.

May import `files` and `errors`; never torch.
"""
