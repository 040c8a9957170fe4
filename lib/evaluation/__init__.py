"""Evaluation of a model: perplexity, distance to the dense model, what it writes, what it answers in lm_eval's tasks.

May import `config`, `data`, `engine`, `models`, `runtime` and `errors`.
"""
