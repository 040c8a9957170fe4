"""What a user asks for: names of models and texts, methods, presets, plans, settings of a run.

May import `demo`, `files` and `errors`; never torch.
"""
