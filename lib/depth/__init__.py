"""Depth pruning: Block Influence, parameter budget, the greedy search, baselines, REAP, the run of `ppllms.py`.

May import `config`, `data`, `engine`, `evaluation`, `export`, `models`, `reporting`, `runs`, `runtime`, `storage` and
`errors`.
"""
