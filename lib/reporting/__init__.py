"""Output for people: console lines, tables, plots, published figures, and the environment of a run.

May import `config`, `storage`, `version` and `errors`.
"""
