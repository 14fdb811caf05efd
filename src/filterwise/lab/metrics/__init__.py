"""How well a dense task is done.

::

    boxes           average precision of boxes and masks, as COCO counts it
"""
