"""What happens inside a network, drawn: the papers' diagnostic figures from recorded signals.

::

    densities       from a histogram's counts to a curve
    canvas          a figure of any grid of panels, and the data that stand beside it
    distributions   channels side by side, and one channel over the epochs
    lines           a measure over layers, steps or epochs
    runs            what is trained and recorded
    gathering       runs of one command, each made once
    catalogue       every figure by its name: its runs, and what draws it
    command         what `filterwise diagnose` does
    writing         files, TensorBoard, and the page to step through
"""
