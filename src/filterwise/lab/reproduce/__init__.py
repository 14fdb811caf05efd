"""``filterwise reproduce``: the papers' tables and figures, each a YAML file, run and recorded.

::

    records         a line of results.jsonl
"""
