"""What a person reads: console lines, tables, plots, the papers' figures, the environment of a run.

Imports `config`, `storage`, `runtime` and `errors`.
"""
