"""What is learned from.

::

    loading         sets by name or path, whole in memory
    folder          class-folder trees: ImageNet's and anybody's
    office          Office-31: three domains
    archive         .npz files of pictures
    pictures        a set in memory, and its file for several processes
    live            steps of small pictures that live on the device, augmented there
    stream          steps of large pictures, read from disk as they are needed
    augment         pad and crop, flip, erase: a different draw for each picture of a batch
    samples         steps of samples that differ in size, read as they are needed
    detection       pictures with objects in them, by layout
    coco            COCO JSON
    voc             Pascal VOC's XML and lists
    clips           folders of frames, with lists
    clouds          clouds of points and meshes, with lists
    maps            pictures with a map of classes
    scenes          a picture, its boxes, classes and masks
    faults          entries that cannot be learned from
    order           whose turn it is: order of an epoch, shares of processes, subsets
"""

from filterwise.lab.data.loading import SETS, load
from filterwise.lab.data.pictures import PictureSet, load_tensors, save_tensors

__all__ = ["SETS", "PictureSet", "load", "load_tensors", "save_tensors"]
