"""Networks of the dense tasks, put together from torchvision's parts.

::

    backbones       residual networks by name
    rcnn            Faster R-CNN and Mask R-CNN with a feature pyramid
    draws           random choices by a picture's own seed
"""
