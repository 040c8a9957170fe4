"""What a user asks for: names of models and texts, methods, presets, plans, settings of a run.

Imports `errors` and the path of the bundled model; never torch.
"""
