"""From a model that people have to a verified file, architecture by architecture.

    python -m filterwise.lab.shipping --out results/shipping

takes models of timm and torchvision, with random weights, all the way: adopt (what timm
standardizes itself) or convert, fold, write as ONNX and as a `torch.export` program, read the file
and compare.
"""
