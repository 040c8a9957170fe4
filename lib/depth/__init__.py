"""Depth pruning: Block Influence, the parameter budget, PP-LLMs' greedy search, its baselines, the run of `ppllms.py`.

Imports any room but `sparsity`.
"""
