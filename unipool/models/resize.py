# SPDX-License-Identifier: Apache-2.0
"""Changing what a trained model's layers see, and how many experts its pools have, in place.

An optimizer that is given goes along: parameters that change their shape are replaced in its
groups, and every state of a parameter's own shape (the moments of Adam, a momentum) is selected,
copied or, for what is new, zeroed row by row as the parameter is. Step counts stay. Do this between
steps, before wrapping in DistributedDataParallel or FSDP; gradients of replaced parameters are
dropped.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..nn.router import norm_router_calibration
from .configuration_unipool import UniPoolConfig
from .modeling_unipool import UniPoolForCausalLM, balanced_layers
from .resize_plan import PoolPlan
from .subset import ExpertSubset

ADDS = ("copy", "init")
SHOWS = ("split", "hidden", "all")


# --- what layers see


def expert_mask(model: UniPoolForCausalLM) -> Tensor:
    """[L, M] bool, True where a layer does not see an expert of its pool."""
    config = model.config
    mask = torch.ones(config.num_hidden_layers, config.num_experts, dtype=torch.bool)
    for layer, row in enumerate(mask):
        row[config.visible_experts(layer)] = False
    return mask


def set_layer_experts(
    model: UniPoolForCausalLM,
    layer_experts: Sequence[Sequence[int]] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> None:
    """Let each layer see other experts of its pool; None: every layer all of them.

    The router keeps the rows of experts that it goes on seeing; rows of new ones are normal, with
    the spread of the rows that the layer has. A NormRouter's calibration becomes c(V, k) of the V
    experts that the layer now sees, which makes up for the norm over more or fewer logits; its
    scale stays. Where a layer's list changes its outputs change: experts compete that did not
    before. Layers whose list stays as it was keep theirs bit for bit.

    Raises:
        ValueError: layer_experts is not as UniPoolConfig.layer_experts must be.
    """
    _check_model("set_layer_experts", model)
    config = _changed(model.config, layer_experts=_plain(layer_experts))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(config.num_hidden_layers):
        position = {e: row for row, e in enumerate(model.config.visible_experts(index))}
        rows.append([position.get(expert, -1) for expert in config.visible_experts(index)])
    _apply(model, config, None, rows, optimizer, generator)


# --- how many experts there are


def resize_pool(
    model: UniPoolForCausalLM,
    num_experts: int,
    *,
    add: str = "copy",
    show: str | None = None,
    experts: Sequence | None = None,
    load: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Give every pool `num_experts` experts: more than it has, or fewer.

    Growing with add = "copy" copies the most loaded experts (each copy counts as taking its part of
    the load) or the given `experts`. `show` says which layers see the new ones:
    - "split" (default for copies): the layers that see an expert are dealt to it and its copies, in
      turn, in order of the load that they send there; each layer then sees exactly one of them, in
      the same row of its router. No score changes, so logits and language loss are the same bit for
      bit, and each copy is trained by layers of its own from the first step on. Copies beyond the
      number of these layers stay hidden, all of them where pools are layer-private.
    - "hidden": no layer sees them until `set_layer_experts`; the same bit for bit.
    - "all" (default for "init"): layers that see an expert see its copies too, with equal rows, and
      drawn experts are seen by all layers of the pool. Outputs change, for the norm, the softmax
      and the choice of k are over more experts; a NormRouter's calibration becomes c(V, k).
    In the first two the calibration stays, for each layer sees as many experts as before.
    add = "init" draws weights as a new model would.

    Shrinking drops the least loaded experts, or the given ones, and the router rows of those; the
    rest stay in order, and calibrations become those of what each layer still sees. Outputs change.

    The balance loss is coefficient * M * ..., so it follows the new M at once; its coefficient is
    kept, and so are the fractions that a delayed loss keeps: a copy takes from those of its
    original, in proportion to the layers; what is left after dropping is scaled to the old sum.

    Args:
        num_experts: M' of each pool.
        experts: ids to copy (M' - M, repeats allowed) or to drop (M - M', distinct): one list if
            the model has one pool, else a list for each pool.
        load: [L, M] as output.load, of any number of micro-batches (see `measure_load`), or [M] for
            a model with one pool; None takes the fractions of the balance loss of the last
            micro-batch in training.
        optimizer: over the model's parameters; see the top of this file.
        seed: of what is drawn.

    Returns:
        For each pool the M' ids that its experts had before, -1 for a drawn one.

    Raises:
        ValueError: an argument does not fit, or a layer would see fewer than k experts.
    """
    config = _check_model("resize_pool", model)
    count = config.num_experts
    show = ("split" if add == "copy" else "all") if show is None else show
    _check_resize(count, num_experts, add, show, experts)
    _changed(config, num_experts=num_experts, layer_experts=None)  # refuses what no model can have
    # `load` is only read where it decides something; all-zero otherwise.
    decides = add == "copy" or num_experts < count
    known = decides and (experts is None or load is not None)
    loads = _layer_loads(model, load) if known else torch.zeros(config.num_hidden_layers, count)
    pools = [PoolPlan(config, index, loads) for index in range(config.num_pools)]
    given = _per_pool(experts, config.num_pools)
    for pool, ids in zip(pools, given, strict=True):
        if num_experts < count:
            pool.drop(_ids(ids, count, count - num_experts, distinct=True), num_experts)
        elif add == "init":
            pool.draw(num_experts - count, show)
        else:
            pool.copy(_ids(ids, count, num_experts - count, distinct=False), num_experts, show)
    changed = _changed(
        config,
        num_experts=num_experts,
        layer_experts=_plain([view for pool in pools for view in pool.views]),
    )
    generator = torch.Generator().manual_seed(seed)
    origins = [pool.origin for pool in pools]
    rows = [row for pool in pools for row in pool.rows]
    fractions = _fractions(model, pools)
    _apply(model, changed, origins, rows, optimizer, generator)
    for balancer, fraction in zip(model.model.balancers, fractions, strict=True):
        balancer.num_experts, balancer.fraction = num_experts, fraction
    return origins


@torch.no_grad()
def measure_load(model: UniPoolForCausalLM, batches: Iterable[Tensor]) -> Tensor:
    """[L, M] int64: (token, slot) pairs that each layer sends to each expert.

    batches: input ids [B, S] each, on the model's device. Runs in evaluation mode.
    """
    config = _check_model("measure_load", model)
    total = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        for ids in batches:
            total += model.model(ids).load.cpu()
    finally:
        model.train(training)
    return total


# --- arguments


def _check_model(op: str, model) -> UniPoolConfig:
    if not isinstance(model, UniPoolForCausalLM):
        raise TypeError(f"{op}: model must be a UniPoolForCausalLM, got {type(model).__name__}")
    return model.config


def _check_resize(count: int, num_experts: int, add: str, show: str, experts) -> None:
    if not isinstance(num_experts, int) or num_experts < 1 or num_experts == count:
        raise ValueError(
            f"resize_pool: num_experts must be a positive integer other than M={count}, "
            f"got {num_experts!r}"
        )
    if add not in ADDS:
        raise ValueError(f"resize_pool: add must be one of {ADDS}, got {add!r}")
    if show not in SHOWS or (add == "init" and show == "split"):
        allowed = SHOWS if add == "copy" else SHOWS[1:]
        raise ValueError(
            f'resize_pool: show must be one of {allowed} for add="{add}", got {show!r}'
        )
    if add == "init" and num_experts > count and experts is not None:
        raise ValueError('resize_pool: experts must be None for add="init", got ids')


def _per_pool(experts: Sequence | None, num_pools: int) -> list:
    if experts is None:
        return [None] * num_pools
    nested = all(isinstance(ids, list | tuple) for ids in experts)
    if num_pools == 1 and not nested:
        return [experts]
    if not nested or len(experts) != num_pools:
        raise ValueError(
            f"resize_pool: experts must be a list of ids for each of the {num_pools} pools, "
            f"got {experts!r}"
        )
    return list(experts)


def _ids(ids: Sequence[int] | None, count: int, due: int, distinct: bool) -> list[int] | None:
    if ids is None:
        return None
    ids = list(ids)
    valid = all(isinstance(expert, int) and 0 <= expert < count for expert in ids)
    if not valid or len(ids) != due or (distinct and len(set(ids)) != due):
        kind = "distinct ids" if distinct else "ids"
        raise ValueError(f"resize_pool: experts must be {due} {kind} in [0, M={count}), got {ids}")
    return ids


def _layer_loads(model: UniPoolForCausalLM, load: Tensor | None) -> Tensor:
    """[L, M] float64 on the CPU."""
    config, visible = model.config, ~expert_mask(model)
    shape = (config.num_hidden_layers, config.num_experts)
    if load is None:
        loads = torch.zeros(shape, dtype=torch.float64)
        for balancer, layers in zip(model.model.balancers, balanced_layers(config), strict=True):
            loads[layers] = _spread(balancer.fraction, visible[layers]) * len(layers)
        if not loads.any():
            raise ValueError(
                "resize_pool: load must be given, or experts, for a model whose balance loss has "
                "seen no micro-batch"
            )
    else:
        loads = torch.as_tensor(load).detach().double().cpu()
        if loads.shape == shape[1:] and config.num_pools == 1:
            loads = _spread(loads, visible)
    if loads.shape != shape or not torch.isfinite(loads).all() or (loads < 0).any():
        one_pool = f" or [M={shape[1]}]" if config.num_pools == 1 else ""
        raise ValueError(
            f"resize_pool: load must be [L={shape[0]}, M={shape[1]}]{one_pool}, finite and not "
            f"negative, got {list(loads.shape)}"
        )
    return loads


def _spread(total: Tensor, visible: Tensor) -> Tensor:
    """total [M] of some layers in equal parts on those that see each expert, visible [L, M]."""
    return total.detach().double().cpu() / visible.sum(0).clamp(min=1) * visible


# --- the change itself


def _plain(views: Sequence[Sequence[int]] | None) -> list[list[int]] | None:
    return None if views is None else [list(view) for view in views]


def _changed(config: UniPoolConfig, **changes) -> UniPoolConfig:
    """The checked configuration with `changes`; layers that see all in order need no list."""
    values = config.to_dict() | changes
    values.pop("transformers_version", None)
    everything = list(range(values["num_experts"]))
    if values["layer_experts"] is not None and all(
        v == everything for v in values["layer_experts"]
    ):
        values["layer_experts"] = None
    return UniPoolConfig(**values)


@torch.no_grad()
def _apply(
    model: UniPoolForCausalLM,
    config: UniPoolConfig,
    origins: list[list[int]] | None,
    rows: list[list[int]],
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator,
) -> None:
    """Give the model the sizes of `config`, weights from `origins` and router rows from `rows`."""
    for pool, origin in zip(model.model.pools, origins or [], strict=origins is not None):
        for name in ("gate_up_proj", "down_proj"):
            std = config.initializer_range
            _replace(pool, name, origin, std, optimizer, generator)
        pool.num_experts = config.num_experts
    for index, (layer, row) in enumerate(zip(model.model.layers, rows, strict=True)):
        router = layer.router
        if row != list(range(router.num_experts)):
            std = float(router.weight.float().std())
            _replace(router, "weight", row, std, optimizer, generator)
            router.num_experts = len(row)
            if getattr(router, "calibration", None) is not None:
                router.calibration = norm_router_calibration(len(row), router.top_k)
        layer.subset = None
        if config.layer_experts is not None:
            subset = ExpertSubset(config.visible_experts(index), config.num_experts)
            layer.subset = subset.to(router.weight.device).train(layer.training)
    # In place: the submodules, the trainer and generation all hold this one object.
    model.config.num_experts, model.config.layer_experts = config.num_experts, config.layer_experts


def _replace(
    module: nn.Module,
    name: str,
    rows: list[int],
    std: float,
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator,
) -> None:
    """A parameter by one of rows `rows` of it, -1 for normal ones; the optimizer follows."""
    old = getattr(module, name)
    index = torch.tensor(rows, device=old.device)
    value = _rows(old.detach(), index)
    fresh = [row for row, source in enumerate(rows) if source < 0]
    if fresh:
        drawn = torch.randn((len(fresh), *old.shape[1:]), generator=generator) * std
        value[fresh] = drawn.to(value)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {
            key: _rows(item, index)
            if isinstance(item, Tensor) and item.shape == old.shape
            else item
            for key, item in optimizer.state.pop(old).items()
        }


def _rows(value: Tensor, index: Tensor) -> Tensor:
    """value[index] along the first axis, zeros where the index is -1."""
    selected = value[index.clamp(min=0)]
    selected[index < 0] = 0
    return selected


def _fractions(model: UniPoolForCausalLM, pools: list[PoolPlan]) -> list[Tensor]:
    """The balance state for the plans of the pools; reads the model before it is changed."""
    config, fractions = model.config, []
    for balancer, layers in zip(model.model.balancers, balanced_layers(config), strict=True):
        old = balancer.fraction
        pool = pools[config.pool_index(layers[0])]
        new = old.new_zeros(len(pool.origin))
        seen = torch.zeros(len(pool.origin))  # by how many of the layers
        for layer in layers:
            seen[pool.views[pool.layers.index(layer)]] += 1
        family = torch.zeros(config.num_experts)
        for expert, origin in enumerate(pool.origin):
            if origin >= 0:
                family[origin] += seen[expert]
        for expert, origin in enumerate(pool.origin):
            if origin >= 0 and family[origin] > 0:
                new[expert] = old[origin] * float(seen[expert] / family[origin])
        dropped = [expert for expert in range(config.num_experts) if expert not in pool.origin]
        if old[dropped].any() and new.sum() > 0:
            new *= old.sum() / new.sum()
        fractions.append(new)
    return fractions
