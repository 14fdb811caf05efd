r"""Head-room in float16: how much of it each layer leaves, and an equivalent form that leaves more.

Weight Standardization gives a filter of n weights the norm :math:`\sqrt n`, He's initialization
:math:`\sqrt 2`. Between such a layer and the norm that follows, outputs are :math:`\sqrt{n/2}`
times nearer to the end of float16 (45 times at n = 4096).
A norm takes the scale of its input out again, so the layer can do without it.
"""

from __future__ import annotations

from filterwise.headroom.measure import headroom_findings, headroom_report
from filterwise.headroom.records import HeadRoom, HeadRoomReport
from filterwise.headroom.rescale import rescale_

__all__ = ["HeadRoom", "HeadRoomReport", "headroom_findings", "headroom_report", "rescale_"]
