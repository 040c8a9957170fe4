"""A causal language model as a stack of decoder layers: loading, offloading, its linears, what travels with it.

Imports `config`, `runtime`, `storage` and `errors`.
"""
