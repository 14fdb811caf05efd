"""Networks of the dense tasks, put together from torchvision's parts.

::

    building        what all of them do: convert the parts that a recipe is for, start, norms
    backbones       residual networks by name
    rcnn            Faster R-CNN and Mask R-CNN with a feature pyramid
    ssd             SSD at 320 pixels
    draws           random choices by a picture's own seed
    deeplab         DeepLabv3
    tsm             temporal shift on a residual network
    dgcnn           dynamic graph network of point clouds
"""
