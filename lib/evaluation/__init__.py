"""Evaluation of a model: perplexity, and what it answers in the tasks of lm_eval.

May import `config`, `engine` and `errors`.
"""
