"""``filterwise report``: what the recorded runs of recipes come to, beside the papers' numbers.

::

    found           the runs in a folder
    tables          lines, differences, deviations: everything that is shown, as numbers
    words           the same as texts, one wording for page, Markdown and terminal
    figures         curves, sweeps over the batch, bars
    page            one HTML file
    markdown        the same for documentation
    command         from a folder to files
"""
