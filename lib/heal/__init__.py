"""Healing: a short training of what pruning left, towards the dense model; the run of `python -m lib.heal`.

May import `cli`, `config`, `data`, `engine`, `evaluation`, `export`, `models`, `reporting`, `runs`, `runtime`,
`storage` and `errors`.
"""
