"""The lab: trains networks under several recipes and compares them.

::

    commands        the command line's doors
    compare         one comparison from settings to pages
    terminal pages figures reading      what a person sees
    summary         medians, quartiles, intervals
    pool timing     who trains when; step times side by side
    engine          one run of a comparison
    tasks           what can be learned: each with data, model, loss and metrics
    training        the training engine, for every run
    results         results.jsonl: whole at every moment
    nets models data                    what is trained, and on what
    settings errors

Needs the extra ``lab``; nothing outside this package and the command line imports it.
"""
