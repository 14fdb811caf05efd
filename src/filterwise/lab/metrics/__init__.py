"""How well a dense task is done.

::

    boxes           average precision of boxes and masks, as COCO counts it
    voc             mean average precision and f-measure, as VOC 2007 counts
    maps            mean intersection over union
"""
