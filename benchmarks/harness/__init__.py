"""What the benchmarks share.

::

    command      options, rows to tables and JSON, exit codes
    memory       peak memory, in a process of its own
    contestants  who takes part, by name
    steps        one optimizer step of a contestant
    nets peers   networks; other people's formulas, written out
    timing       rounds in turning order; medians, quartiles, intervals
    machine      versions, hardware, commit, and whether the machine was idle
"""
