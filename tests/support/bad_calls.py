# SPDX-License-Identifier: Apache-2.0
"""Malformed calls of every op: one valid call each, and ways to spoil one argument of it.

A row is (op, argument, spoil) or (op, argument, spoil, named): `spoil` maps the valid argument to a
bad one, and the error must name the op and the argument `named` (default: the spoilt one; a regular
expression where the fault lies between two arguments and either may be blamed).
"""

import math
from collections.abc import Callable

import torch
from cases import Case, logits, plan, pool, rand, weights
from torch import Tensor

from unipool import ops, reference

CASE = Case("bad", 5, 6, 2, 10, 4)
ROWS = CASE.tokens * CASE.top_k


def valid_arguments() -> dict[str, dict]:
    """A fresh valid call of each public op and of the raw ops that no public op covers. The fields
    of a plan or a routing are spread out under their own names."""
    f32 = torch.float32
    z, w = logits(CASE, f32), weights(CASE, f32)
    p = plan(CASE)._asdict()
    gate_up, down = pool(CASE, f32)
    x, y = rand(CASE, "x", CASE.tokens, 10).float(), rand(CASE, "y", ROWS, 10).float()
    steer = {"bias": torch.zeros(6), "mask": torch.zeros(6, dtype=torch.bool)}
    routed = reference.softmax_topk(z, 2)
    grads = {
        "grad_weights": torch.ones_like(routed.weights),
        "grad_importance": torch.ones_like(routed.importance),
    }
    mlp = {"gate_up": gate_up, "down": down}
    router = rand(CASE, "router", 6, 10).float()
    return {
        "router_logits": {"x": x, "weight": router},
        "router_logits_bwd": {"grad": z, "x": x, "weight": router},
        "norm_topk": {
            "logits": z, "scale": torch.tensor(1.0), "top_k": 2, "calibration": 1.0, "eps": 1e-8,
            **steer,
        },
        "softmax_topk": {"logits": z, "top_k": 2, "renormalize": False, **steer},
        "dispatch_plan": {"experts": routed.experts, "num_experts": 6},
        "permute": {"x": x, **p},
        "unpermute": {"y": y, **p, "weights": w},
        "grouped_mm": {"a": y, "b": gate_up, "offsets": p["offsets"]},
        "expert_mlp": {"x": x, "weights": w, "experts": routed.experts, **mlp},
        "norm_topk_bwd": {
            **grads, "logits": z, "scale": torch.tensor(1.0), "experts": routed.experts,
            "calibration": 1.0, "eps": 1e-8, "mask": steer["mask"],
        },
        "softmax_topk_bwd": {
            **grads, "logits": z, "experts": routed.experts, "renormalize": False,
            "mask": steer["mask"],
        },
        "unpermute_bwd": {
            "grad": x, "y": y, "order": p["order"], "inverse": p["inverse"], "weights": w,
        },
        "grouped_mm_bwd_a": {"grad": y, "b": down, "offsets": p["offsets"]},
        "grouped_wgrad": {
            "grad": [y, y], "input": [x, x], "order": [p["order"]] * 2,
            "offsets": [p["offsets"]] * 2, "grad_top_k": 0, "input_top_k": 2,
        },
        "grouped_wgrad_": {
            "sum": torch.zeros(6, 10, 10), "grad": [y], "input": [x], "order": [p["order"]],
            "offsets": [p["offsets"]], "grad_top_k": 0, "input_top_k": 2,
        },
        **{
            op: {"grad": x, "weights": w, **mlp, **p, "preact": rand(CASE, "z", ROWS, 8).float()}
            for op in ("expert_mlp_bwd", "expert_mlp_bwd_")
        },
    }  # fmt: skip


def call(op: str, arguments: dict, raw: object) -> object:
    """The public op if there is one, else the raw one."""
    a = dict(arguments)
    if op not in ops.__all__:
        return getattr(raw, op)(**a)
    if op in ("permute", "unpermute") and "plan" not in a:
        a["plan"] = ops.DispatchPlan(a.pop("order"), a.pop("inverse"), a.pop("offsets"))
    if op == "expert_mlp" and "routing" not in a:
        a["routing"] = ops.Routing(a.pop("weights"), a.pop("experts"), None, None)
    return getattr(ops, op)(**a)


# --- ways to spoil an argument


def value(v: object) -> Callable[[object], object]:
    return lambda _: v


def put(index: tuple | int, v: float) -> Callable[[Tensor], Tensor]:
    """One wrong value in an index tensor; only a backend that reads them on the host can tell."""

    def spoil(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = v
        return t

    spoil.is_value = True
    return spoil


def put_in_segment(segment: int, index: int, v: float) -> Callable[[list[Tensor]], list[Tensor]]:
    one = put(index, v)

    def spoil(tensors: list[Tensor]) -> list[Tensor]:
        return [one(t) if i == segment else t for i, t in enumerate(tensors)]

    spoil.is_value = True
    return spoil


def longer(t: Tensor) -> Tensor:
    return torch.cat([t, t[:1]])


def wider(t: Tensor) -> Tensor:
    return torch.cat([t, t[..., :1]], -1)


def extra_dim(t: Tensor) -> Tensor:
    return t.unsqueeze(0)


def flat(t: Tensor) -> Tensor:
    return t.flatten()


def scalar(t: Tensor) -> Tensor:
    return t.flatten()[0]


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


def wrong_dtype(t: Tensor) -> Tensor:
    return t.int() if t.is_floating_point() else t.double()


def numpy_like(t: Tensor) -> list:
    return t.tolist()


# Tensor arguments of each op, and what an error about their shape or device may name instead.
TENSORS = {
    "router_logits": {"x": "x|weight", "weight": "weight|x"},
    "router_logits_bwd": {"grad": "", "x": "x|weight|grad", "weight": "weight|x|grad"},
    "norm_topk": {"logits": "logits|scale|bias|mask", "scale": "", "bias": "", "mask": ""},
    "softmax_topk": {"logits": "logits|bias|mask", "bias": "", "mask": ""},
    "dispatch_plan": {"experts": ""},
    "permute": {
        "x": "x|order|inverse|plan", "order": "order|plan", "inverse": "inverse|plan|order",
    },
    "unpermute": {
        "y": "y|inverse|plan", "inverse": "inverse|y|plan|order|weights", "weights": "",
        "order": "order|plan|inverse",
    },
    "grouped_mm": {"a": "a|b|offsets", "b": "b|a|offsets", "offsets": ""},
    "expert_mlp": {
        "x": "x|experts|weights|gate_up|inverse|order",
        "weights": "weights|experts",
        "experts": "experts|weights|inverse|order|offsets",
        "gate_up": "gate_up|down|offsets",
        "down": "",
    },
    "norm_topk_bwd": {
        "grad_weights": "", "grad_importance": "", "logits": ".*", "scale": "", "mask": "",
        "experts": "experts|grad_weights",
    },
    "softmax_topk_bwd": {
        "grad_weights": "", "grad_importance": "", "logits": ".*", "mask": "",
        "experts": "experts|grad_weights",
    },
    "unpermute_bwd": {
        "grad": "grad|inverse|y", "y": "y|inverse|grad|order", "order": "order", "weights": "",
        "inverse": "inverse|grad|y|weights",
    },
    "grouped_mm_bwd_a": {"grad": "grad|b|offsets", "b": "b|grad|offsets", "offsets": ""},
    **{
        op: {
            "grad": ".*", "weights": "", "gate_up": "gate_up|down|preact|offsets", "down": "",
            "order": "", "inverse": "inverse|weights|order", "offsets": "", "preact": "",
        }
        for op in ("expert_mlp_bwd", "expert_mlp_bwd_")
    },
}  # fmt: skip


# torch itself fails on a missing tensor if the arguments before it are optional.
NONE_IS_TORCHS = {("norm_topk_bwd", "logits"), ("softmax_topk_bwd", "logits")}
# What looks spoilt but is not: one more token, a scale of one element.
ALLOWED = {
    ("router_logits", "x", longer),
    ("router_logits", "weight", longer),
    ("norm_topk", "logits", longer),
    ("softmax_topk", "logits", longer),
    ("dispatch_plan", "experts", longer),
    ("dispatch_plan", "experts", meta),  # its only tensor: a call on the meta device
    ("grouped_mm", "a", longer),
    ("grouped_mm_bwd_a", "grad", longer),
    *[
        (op, "scale", spoil)
        for op in ("norm_topk", "norm_topk_bwd")
        for spoil in (extra_dim, scalar, longer)
    ],
}


def generic_rows() -> list[tuple]:
    """Every tensor argument in the wrong dtype, on another device, of the wrong rank or size, and
    no tensor at all."""
    rows = []
    for op, arguments in TENSORS.items():
        for name, blamed in arguments.items():
            named = blamed or name
            optional = name in ("bias", "mask", "grad_weights", "grad_importance")
            optional = optional or (op, name) == ("unpermute", "weights")
            rows += [(op, name, spoil, named) for spoil in (wrong_dtype, meta, extra_dim)]
            rows += [(op, name, spoil, named) for spoil in (scalar, longer)]
            rows.append((op, name, numpy_like, f"{named}|routing|plan"))
            if not optional and (op, name) not in NONE_IS_TORCHS:
                rows.append((op, name, value(None), f"{named}|routing|plan"))
    return [row for row in rows if row[:3] not in ALLOWED]


SPECIFIC = [
    # router_logits
    ("router_logits", "x", wider, "weight|x"),
    ("router_logits", "x", lambda x: x[:, :0], "x"),  # D = 0
    ("router_logits", "x", Tensor.half),
    ("router_logits", "x", Tensor.bfloat16, "weight"),
    ("router_logits", "weight", lambda w: w.T),
    ("router_logits", "weight", lambda w: w[:0]),  # M = 0
    ("router_logits", "weight", Tensor.bfloat16),
    ("router_logits_bwd", "grad", wider),
    ("router_logits_bwd", "grad", lambda g: g.T),
    ("router_logits_bwd", "grad", Tensor.bfloat16),
    ("router_logits_bwd", "grad", Tensor.double),
    ("router_logits_bwd", "weight", wider, "weight"),
    # sizes and options of the routers
    *[
        (op, "top_k", value(k))
        for op in ("norm_topk", "softmax_topk")
        for k in (0, -1, 7, 17, 2**40, 2.5, "2", None)
    ],
    *[("norm_topk", "calibration", value(c)) for c in (math.nan, math.inf, 0.0, -1.0, "1", None)],
    *[("norm_topk", "eps", value(e)) for e in (math.nan, math.inf, -1e-8, "0", None)],
    ("norm_topk", "logits", lambda z: z[:, :0], "logits|top_k"),  # M = 0
    ("softmax_topk", "logits", lambda z: z[:, :0], "logits|top_k"),
    ("norm_topk", "logits", lambda z: z[:, :1], "top_k|logits|bias|mask"),  # k > M
    ("norm_topk", "logits", Tensor.half),
    ("softmax_topk", "logits", lambda z: z.to(torch.complex64)),
    ("norm_topk", "scale", lambda s: s.expand(2)),
    ("norm_topk", "scale", lambda s: s.expand(6)),
    ("norm_topk", "mask", lambda m: m[:5]),
    ("norm_topk", "mask", lambda m: m.expand(5, 6)),
    ("norm_topk", "mask", Tensor.float),
    ("softmax_topk", "bias", lambda b: b.expand(5, 6)),
    ("softmax_topk", "bias", Tensor.long),
    # plan
    ("dispatch_plan", "experts", value([]), "experts"),
    ("dispatch_plan", "experts", flat),
    ("dispatch_plan", "experts", Tensor.long),
    ("dispatch_plan", "experts", Tensor.bool),
    ("dispatch_plan", "experts", lambda e: e[:, :0]),  # k = 0
    ("dispatch_plan", "experts", lambda e: [e, wider(e)]),
    ("dispatch_plan", "experts", lambda e: [e, e.long()]),
    ("dispatch_plan", "experts", lambda e: [e, e.to("meta")]),
    ("dispatch_plan", "experts", lambda e: [e, flat(e)]),
    ("dispatch_plan", "experts", lambda e: [e, None]),
    ("dispatch_plan", "experts", value(3)),
    ("dispatch_plan", "experts", value(None)),
    *[("dispatch_plan", "num_experts", value(m)) for m in (0, -3, 2**31, 2.5, "6", None)],
    # permute and unpermute
    ("permute", "order", put(0, ROWS), "order"),
    ("permute", "order", put(3, -2), "order"),
    ("permute", "order", Tensor.long, "order|plan"),
    ("permute", "order", lambda o: o[:-1], "order|x|plan"),
    ("permute", "x", lambda x: x[:-1], "x|order|plan"),
    ("permute", "x", Tensor.half),
    ("permute", "inverse", lambda i: i[:, :0], "inverse|plan|top_k"),
    ("unpermute", "inverse", put((0, 0), ROWS), "inverse"),
    ("unpermute", "inverse", put((4, 1), -2), "inverse"),
    ("unpermute", "inverse", lambda i: i[:, :1], "inverse|y|plan|weights"),
    ("unpermute", "inverse", Tensor.long, "inverse|plan"),
    ("unpermute", "y", lambda y: y[:-1], "y|inverse|plan"),
    ("unpermute", "weights", wider),
    ("unpermute", "weights", Tensor.double),
    ("unpermute", "weights", Tensor.bfloat16),
    ("unpermute", "weights", lambda w: w.T, "weights"),
    # grouped_mm
    ("grouped_mm", "a", wider, "a|b"),
    ("grouped_mm", "b", lambda b: b[0], "b"),
    ("grouped_mm", "b", wider, "b|a"),
    ("grouped_mm", "b", lambda b: b[:0], "b|offsets"),  # M = 0
    ("grouped_mm", "b", lambda b: b[:5], "b|offsets"),
    ("grouped_mm", "b", Tensor.bfloat16, "b"),
    ("grouped_mm", "b", Tensor.double, "b"),
    ("grouped_mm", "offsets", Tensor.long),
    ("grouped_mm", "offsets", lambda o: o[:-1], "offsets|b"),
    ("grouped_mm", "offsets", put(0, 1)),
    ("grouped_mm", "offsets", put(0, -1)),
    ("grouped_mm", "offsets", put(2, 9)),
    ("grouped_mm", "offsets", put(3, -1)),
    ("grouped_mm", "offsets", put(6, ROWS + 1)),
    ("grouped_mm", "offsets", put(6, 2**31 - 1)),
    ("grouped_mm_bwd_a", "offsets", put(6, ROWS + 1)),
    ("grouped_mm_bwd_a", "offsets", put(2, 9)),
    ("grouped_mm_bwd_a", "grad", wider, "grad|b"),
    # expert_mlp
    ("expert_mlp", "x", wider, "x|gate_up"),
    ("expert_mlp", "x", lambda x: x[:-1], "x|experts|weights|inverse|order"),
    ("expert_mlp", "x", Tensor.half),
    ("expert_mlp", "x", Tensor.double, "x|gate_up|weights"),
    ("expert_mlp", "gate_up", lambda g: g[:, :-1], "gate_up|down"),  # odd 2F
    ("expert_mlp", "gate_up", lambda g: g[:, :6], "gate_up|down"),
    ("expert_mlp", "gate_up", lambda g: g.mT, "gate_up|down"),
    ("expert_mlp", "gate_up", lambda g: g[:5], "gate_up|down"),  # another pool
    ("expert_mlp", "gate_up", lambda g: g[:0], "gate_up"),  # M = 0
    ("expert_mlp", "gate_up", Tensor.bfloat16),
    ("expert_mlp", "down", lambda d: d.mT),
    ("expert_mlp", "down", lambda d: d[:5]),
    ("expert_mlp", "down", wider),
    ("expert_mlp", "down", Tensor.bfloat16),
    ("expert_mlp", "weights", wider, "weights|experts"),
    ("expert_mlp", "weights", lambda w: w[:, :1], "weights|experts"),
    ("expert_mlp", "weights", Tensor.double),
    ("expert_mlp", "weights", Tensor.bfloat16),
    ("expert_mlp", "experts", Tensor.long),
    ("expert_mlp", "experts", lambda e: e[:, :0], "experts|weights|inverse"),
    # raw backward ops
    ("norm_topk_bwd", "eps", value(-1.0)),
    *[("norm_topk_bwd", "calibration", value(c)) for c in (math.nan, math.inf, 0.0, -1.0)],
    ("norm_topk_bwd", "grad_weights", wider, "grad_weights|experts"),
    ("softmax_topk_bwd", "grad_weights", wider, "grad_weights|experts"),
    ("unpermute_bwd", "order", put(0, ROWS)),
    ("unpermute_bwd", "inverse", put((0, 0), ROWS)),
    ("unpermute_bwd", "grad", wider, "grad|y"),
    *[
        (op, name, spoil)
        for op in ("expert_mlp_bwd", "expert_mlp_bwd_")
        for name, spoil in [
            ("order", put(0, ROWS)),
            ("inverse", put((0, 0), ROWS)),
            ("offsets", put(6, ROWS + 1)),
            ("offsets", put(2, 9)),
            ("preact", wider),
            ("preact", lambda z: z[:0]),
        ]
    ],
    ("expert_mlp_bwd_", "preact", lambda z: z.t().contiguous().t()),
    # weight gradient over segments
    ("grouped_wgrad", "grad", value([]), "grad"),
    ("grouped_wgrad", "grad", lambda g: g[:1], "grad|input"),
    ("grouped_wgrad", "input", lambda g: g[:1], "input"),
    ("grouped_wgrad", "offsets", lambda o: o[:1], "offsets"),
    ("grouped_wgrad", "order", lambda o: o[:1], "order"),
    ("grouped_wgrad", "order", value([]), "order"),
    ("grouped_wgrad", "grad", lambda g: [g[0], wider(g[1])], "grad"),
    ("grouped_wgrad", "input", lambda x: [x[0], wider(x[1])], "input"),
    ("grouped_wgrad", "input", lambda x: [x[0], longer(x[1])], "input"),
    ("grouped_wgrad", "input", lambda x: [x[0], x[1].double()], "input"),
    ("grouped_wgrad", "grad", lambda g: [g[0], g[1].int()], "grad"),
    ("grouped_wgrad", "grad", lambda g: [g[0], g[1].to("meta")], "grad"),
    ("grouped_wgrad", "offsets", lambda o: [o[0], o[1][:-1]], "offsets"),
    ("grouped_wgrad", "offsets", put_in_segment(1, 2, 9), "offsets"),
    ("grouped_wgrad", "offsets", put_in_segment(1, 6, ROWS + 1), "offsets"),
    ("grouped_wgrad", "offsets", lambda o: [t[:1] for t in o], "offsets"),  # M = 0
    ("grouped_wgrad", "order", put_in_segment(1, 1, ROWS), "order"),
    ("grouped_wgrad", "order", put_in_segment(1, 1, -2), "order"),
    ("grouped_wgrad", "order", lambda o: [o[0], o[1].long()], "order"),
    ("grouped_wgrad", "grad_top_k", value(-1)),
    ("grouped_wgrad", "input_top_k", value(-2)),
    ("grouped_wgrad", "input_top_k", value(3), "input|top_k"),
    ("grouped_wgrad_", "sum", longer),
    ("grouped_wgrad_", "sum", wider),
    ("grouped_wgrad_", "sum", Tensor.bfloat16),
    ("grouped_wgrad_", "sum", Tensor.double),
    ("grouped_wgrad_", "sum", lambda t: t.mT),
    ("grouped_wgrad_", "sum", lambda t: t[0]),
    ("grouped_wgrad_", "sum", meta),
    ("grouped_wgrad_", "offsets", put_in_segment(0, 2, 9)),
]  # fmt: skip


def all_rows() -> list[tuple[str, str, Callable, str]]:
    return [(*row, row[1])[:4] for row in [*generic_rows(), *SPECIFIC]]
