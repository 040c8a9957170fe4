"""What a person reads: console lines, tables, plots, the papers' figures, the environment of a run.

May import `config` and `storage`.
"""
