"""Evaluation of a model: perplexity, and zero-shot accuracy on lm_eval tasks.

Imports `engine` and the rooms below it.
"""
