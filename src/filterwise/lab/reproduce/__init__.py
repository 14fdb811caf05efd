"""``filterwise reproduce``: the papers' tables and figures, each a YAML file, run and recorded.

::

    documents       YAML files that know their lines
    schema          what a recipe may say
    experiments     recipes by id, and the settings that their rows mean
    records         a line of results.jsonl
    jobs            runs of rows, and who does them
"""
