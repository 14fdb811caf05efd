"""Early warnings: which of them came before a training collapsed, and which for nothing.

    python -m filterwise.lab.early_warnings --out results/early_warnings

trains small networks that go well and small networks that do not under `filterwise.monitor`, and
counts. The thresholds were chosen on runs of the group ``choose`` and their like; the group
``judge`` has other seeds, learning rates and decays, and a network of another depth, and was run
when they stood.
"""
