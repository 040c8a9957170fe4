"""What a model is worth: perplexity, and accuracy on tasks of lm_eval.

Imports `engine` and the rooms below it.
"""
