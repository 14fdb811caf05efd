"""A few lines each for the training frameworks that people use.

::

    lightning       a callback for Lightning's Trainer: defers and logs

Each module needs the framework that it is named after; `filterwise` itself imports none of them.
"""
