"""A causal language model as a stack of decoder layers: loading, offloading, linears, what travels with it.

May import `config`, `runtime`, `storage`, `files` and `errors`.
"""
