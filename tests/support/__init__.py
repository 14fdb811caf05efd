"""What the tests share: slow oracles, cases, tolerances, one comparison, and faulty kernels.

Nothing here imports filterwise's kernel: `references` writes every method's published formula out
in float64 (or in multiple precision), one filter after the other.
"""
