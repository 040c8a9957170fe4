"""Evaluation of a model: perplexity, and zero-shot accuracy on lm_eval tasks.

May import `config`, `engine` and `errors`.
"""
