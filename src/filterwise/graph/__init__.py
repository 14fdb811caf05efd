"""What follows what in a model: which norm takes a layer's output, and what lies on a branch.

The forward pass is found in one of three ways, the best that serves: symbolic tracing, one run with
an example input, or the order in which modules are registered. All three fill one graph
(`nodes.py`), and every question is answered on that (`flow.py`).
"""

from __future__ import annotations

from filterwise.graph.branches import Branch
from filterwise.graph.flow import Flow, trace
from filterwise.graph.writers import out_of_place

__all__ = ["Branch", "Flow", "out_of_place", "trace"]
