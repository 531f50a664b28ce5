"""State dicts of a sharded ``LinearLoss``: under the name of a parameter stand the rows of all classes, or none.

A ``DTensor`` says of which it holds a part. Rows that are no ``DTensor`` are named by their classes,
``weight [0, 3) of 10``: the ranks save different things, and a rank that reads those of another sees it.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .shard import ClassShard, is_dtensor


def name_by_classes(
    shard: ClassShard, parameters: Mapping[str, Tensor | None], state_dict: dict[str, Tensor], prefix: str
) -> None:
    for name, parameter in parameters.items():
        rows = parameter is not None and parameter.dim() > 0 and not is_dtensor(parameter)
        if rows and len(shard) < shard.num_classes:
            state_dict[prefix + _of_classes(shard, name)] = state_dict.pop(prefix + name)


def take_own_rows(
    shard: ClassShard, parameters: Mapping[str, Tensor | None], state_dict: dict[str, Tensor], prefix: str, copy: bool
) -> list[str]:
    """Puts this rank's part of what is saved in the place of it, as the parameters want it; -> what is wrong.

    copy: whether the part is to outlive the whole, which a view of it would keep.
    """
    errors = []
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        try:
            mine = _own_part(shard, parameter, state_dict, prefix, name)
        except ValueError as error:
            errors.append(str(error))
            state_dict.pop(prefix + name, None)
            continue
        if mine is not None:
            mine = mine.clone() if copy else mine
            state_dict[prefix + name] = shard.dtensor(mine) if is_dtensor(parameter) else mine
    return errors


def _of_classes(shard: ClassShard, name: str) -> str:
    return f"{name} [{shard.start}, {shard.stop}) of {shard.num_classes}"


def _own_part(
    shard: ClassShard, parameter: Tensor, state_dict: dict[str, Tensor], prefix: str, name: str
) -> Tensor | None:
    """Raises ValueError where that cannot be known."""
    whole, own = prefix + name, prefix + _of_classes(shard, name)
    if own in state_dict:
        return state_dict.pop(own)
    others = [key for key in state_dict if key.startswith(f"{whole} [")]
    if others:
        for key in others:
            del state_dict[key]
        raise ValueError(f"got {others[0]}, of another rank or other shards; this rank has {own}")
    value = state_dict.get(whole)
    if value is None:
        return None
    shape = torch.Size((shard.num_classes, *parameter.shape[1:]) if parameter.dim() > 0 else ())
    if value.shape != shape:
        raise ValueError(f"expected {whole} of all classes, {tuple(shape)}, got {tuple(value.shape)}")
    if is_dtensor(value):
        coordinate = value.device_mesh.get_coordinate()
        if not shard.holds(value) or list(coordinate or []) != [dist.get_rank(shard.group)]:
            raise ValueError(
                f"{whole} is a DTensor of other shards, or what torch.save kept of another rank, {coordinate}: save "
                "with torch.distributed.checkpoint, or its full_tensor()"
            )
        return value.to_local()
    return value[shard.start : shard.stop] if value.dim() > 0 else value
