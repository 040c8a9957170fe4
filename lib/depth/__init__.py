"""Depth pruning: Block Influence, parameter budget, PP-LLMs' greedy search, its baselines, the run of `ppllms.py`.

May import `config`, `data`, `engine`, `evaluation`, `export`, `models`, `reporting`, `runs`, `runtime`, `storage` and
`errors`.
"""
