"""Weights of which every process holds a part: FSDP2's (`DTensor`), and ZeRO-3's (flat, padded to equal parts)."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether other processes hold parts of the weights."""
    return any(isinstance(own, DTensor) or hasattr(own, "ds_tensor") for own in model.parameters())


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter; all of it where it is not sharded."""
    return getattr(parameter, "ds_tensor", parameter)


def gathered(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A part that is sharded as `parameter` is, as one process would have it alone. All processes call this."""
    if isinstance(part, DTensor):
        return part.full_tensor()
    if hasattr(parameter, "ds_tensor"):
        group = parameter.ds_process_group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    return part


def part_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, sharded as `parameter` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    if hasattr(parameter, "ds_tensor"):
        own = parameter.ds_tensor
        start = own.numel() * dist.get_rank(parameter.ds_process_group)
        part = torch.zeros_like(own)
        values = tensor.flatten()[start : start + own.numel()]
        part[: len(values)] = values
        return part
    return tensor.to(parameter.device)


def make_whole(model: torch.nn.Module) -> None:
    """Give every process all of the weights, on the CPU, and the modules their own classes. It is not trained again."""
    parameters: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if isinstance(own, DTensor):
                # One parameter may stand in several modules.
                if own not in parameters:
                    parameters[own] = torch.nn.Parameter(own.detach().full_tensor().cpu(), own.requires_grad)
                setattr(module, name, parameters[own])
            elif hasattr(own, "ds_tensor"):
                own.data = gathered(own_part(own).detach(), own).cpu()
        if isinstance(module, FSDPModule):
            # `fully_shard` has put a class of its own, with the module's as second base, in place of the module's,
            # and a checkpoint carries the code of its model's class. A compiled layer has another class above it.
            sharded = next(own for own in type(module).__mro__ if FSDPModule in own.__bases__)
            module.__class__ = sharded.__bases__[1]
