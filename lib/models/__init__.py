"""A causal language model as a stack of decoder layers: loading, offloading, matrices, experts, what travels with it.

May import `config`, `runtime`, `storage`, `files` and `errors`.
"""
