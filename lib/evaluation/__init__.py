"""What a model is worth: perplexity, and accuracy on tasks of lm_eval.

May import `config`, `engine` and `errors`.
"""
