"""Output for people: console lines, tables, plots, published figures, and the environment of a run.

Imports `config`, `storage`, `runtime` and `errors`.
"""
