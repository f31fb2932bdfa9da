# SPDX-License-Identifier: Apache-2.0
"""Which experts a resized pool has, and what its layers then see; plain lists, no weights."""

import torch
from torch import Tensor

from .configuration_unipool import UniPoolConfig


class PoolPlan:
    """The plan for one pool: where its experts come from, and what its layers see.

    origin: old id of each new expert, -1 if drawn. views: for each of its layers, the ids it sees.
    rows: for each of its layers, the old router row of each new one, -1 if drawn.
    """

    def __init__(self, config: UniPoolConfig, index: int, loads: Tensor) -> None:
        layers = range(config.num_hidden_layers)
        self.layers = [layer for layer in layers if config.pool_index(layer) == index]
        self.loads = loads[self.layers].double()  # [layers of the pool, M]
        self.origin = list(range(config.num_experts))
        self.views = [config.visible_experts(layer) for layer in self.layers]
        self.rows = [list(range(len(view))) for view in self.views]
        self.top_k = config.num_experts_per_tok

    def drop(self, ids: list[int] | None, remaining: int) -> None:
        if ids is None:
            # Among equals the later ones go.
            order = torch.argsort(self.loads.sum(0), descending=True, stable=True)
            ids = order[remaining:].tolist()
        gone = set(ids)
        self.origin = [expert for expert in self.origin if expert not in gone]
        new_id = {old: new for new, old in enumerate(self.origin)}
        for index, view in enumerate(self.views):
            self.rows[index] = [row for row, expert in enumerate(view) if expert not in gone]
            self.views[index] = [new_id[expert] for expert in view if expert not in gone]
            if len(self.views[index]) < self.top_k:
                raise ValueError(
                    f"resize_pool: every layer must be left with at least k={self.top_k} experts, "
                    f"got {len(self.views[index])} in layer {self.layers[index]}"
                )

    def draw(self, added: int, show: str) -> None:
        new = list(range(len(self.origin), len(self.origin) + added))
        self.origin += [-1] * added
        if show == "all":
            for view, rows in zip(self.views, self.rows, strict=True):
                view += new
                rows += [-1] * added

    def copy(self, ids: list[int] | None, total: int, show: str) -> None:
        for index in range(total - len(self.origin)):
            source = self._most_loaded() if ids is None else ids[index]
            self.origin.append(source)
        if show == "all":
            self._show_copies()
        elif show == "split":
            for source in sorted(set(self.origin[self.loads.shape[1] :])):
                self._split(source)

    def _most_loaded(self) -> int:
        """The expert with the greatest load for each of its copies so far."""
        copies = torch.bincount(torch.tensor(self.origin), minlength=self.loads.shape[1])
        return int((self.loads.sum(0) / copies).argmax())

    def _show_copies(self) -> None:
        for new in range(self.loads.shape[1], len(self.origin)):
            for view, rows in zip(self.views, self.rows, strict=True):
                if self.origin[new] in view:
                    rows.append(rows[view.index(self.origin[new])])
                    view.append(new)

    def _split(self, source: int) -> None:
        """Deal the layers that see `source` to it and its copies."""
        family = [expert for expert, origin in enumerate(self.origin) if origin == source]
        seeing = [index for index, view in enumerate(self.views) if source in view]
        seeing.sort(key=lambda index: -float(self.loads[index, source]))
        for turn, index in enumerate(seeing):
            view = self.views[index]
            view[view.index(source)] = family[turn % len(family)]
