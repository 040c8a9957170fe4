"""How a run goes from settings to result: a single run that resumes, a grid of runs.

Imports `reporting`, `models` and the rooms below them.
"""
