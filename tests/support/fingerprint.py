"""Everything about a model that a refused call must leave alone."""

from __future__ import annotations

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_post_hooks")


def fingerprint(model):
    """Return types, order, identities and bits of tensors, hooks, modes, flags, strides."""
    seen = []
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = tuple(tuple(getattr(module, hook).values()) for hook in HOOKS)
        own = tuple(key for key in module.__dict__ if not key.startswith("_"))
        seen.append(
            (name, type(module), id(module), module.training, hooks, own, tuple(module._modules))
        )
        for kind in (module._parameters, module._buffers):
            for key, value in kind.items():
                if value is None:
                    seen.append((name, key, None))
                    continue
                bits = value.detach().cpu().contiguous().numpy().tobytes()
                flags = (value.requires_grad, value.dtype, str(value.device), value.stride())
                seen.append((name, key, id(value), bits, flags))
    return seen
