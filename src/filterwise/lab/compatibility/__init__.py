"""Does every model of torchvision and timm convert, train a step, and fold back?

``python -m filterwise.lab.compatibility`` examines architecture by architecture, each in a process
of its own, and writes what came out as a page.
"""
