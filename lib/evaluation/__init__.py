"""Evaluation of a model: perplexity, what it writes, and zero-shot accuracy on lm_eval tasks.

May import `config`, `data`, `engine`, `models`, `runtime` and `errors`.
"""
