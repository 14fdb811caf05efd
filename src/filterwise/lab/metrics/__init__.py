"""How well a dense task is done.

::

    boxes           average precision of boxes and masks, as COCO counts it
    voc             mean average precision and f-measure, as VOC 2007 counts
    classes         mean class accuracy and overall accuracy
    maps            mean intersection over union
"""
