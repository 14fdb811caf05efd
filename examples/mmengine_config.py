"""A config in OpenMMLab's style: what its models are built of, converted and deferred.

    python examples/mmengine_config.py

needs ``pip install '.[openmmlab]'``. The fields are those of an mmdet or mmpretrain config;
the model here is a small one, so that it runs anywhere.
"""

custom_imports = {"imports": ["filterwise.integrations.mmengine"]}
model = {
    "type": "Converted",
    "recipe": "gn(4)+ws(like=mmcv)",
    "model": {"type": "SmallNet", "norm_cfg": {"type": "BN"}},
}
optim_wrapper = {
    "type": "DeferringOptimWrapper",
    "constructor": "ParamGroups",
    "accumulative_counts": 4,
    "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
}
train_cfg = {"by_epoch": False, "max_iters": 8}
train_dataloader = {
    "batch_size": 2,
    "collate_fn": {"type": "default_collate"},
    "dataset": {"type": "Pictures"},
    "sampler": {"type": "DefaultSampler", "shuffle": False},
}
default_scope = "mmengine"


def register() -> None:
    """Register what a codebase such as mmdet brings itself: a model and a data set."""
    import torch
    from mmcv.cnn import ConvModule
    from mmengine.model import BaseModel
    from mmengine.registry import DATASETS, MODELS
    from torch import nn

    class SmallNet(BaseModel):
        def __init__(self, norm_cfg: dict) -> None:
            super().__init__()
            self.trunk = nn.Sequential(
                ConvModule(3, 16, 3, norm_cfg=norm_cfg), ConvModule(16, 16, 3, norm_cfg=norm_cfg)
            )
            self.head = nn.Linear(16, 4)

        def forward(self, inputs, labels, mode="tensor"):
            out = self.head(self.trunk(inputs).mean((2, 3)))
            if mode == "loss":
                return {"loss": nn.functional.cross_entropy(out, labels)}
            return out

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            return {"inputs": torch.randn(3, 12, 12, generator=generator), "labels": index % 4}

    MODELS.register_module(module=SmallNet, force=True)
    DATASETS.register_module(module=Pictures, force=True)


def train(folder: str, **changes: object):
    """Run mmengine's runner on this config, and return it."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    register()
    names = ("model", "optim_wrapper", "train_cfg", "train_dataloader", "default_scope")
    settings = {name: globals()[name] for name in (*names, "custom_imports")} | changes
    runner = Runner.from_cfg(Config({**settings, "work_dir": folder, "log_level": "ERROR"}))
    runner.train()
    return runner


if __name__ == "__main__":
    import tempfile

    import filterwise as fw

    with tempfile.TemporaryDirectory() as folder:
        print(fw.describe(train(folder).model))
