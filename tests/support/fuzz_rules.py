# SPDX-License-Identifier: Apache-2.0
"""Which calls of the raw ops are valid, told from the arguments alone and apart from the checks in
C++: a row per op, and a judgement of any arguments by it.

A parameter is written "kind: shape", "?" before it if it may be None, "*" if it is a list of
tensors. Kinds: float (all of an op share one dtype), acc (float32; float64 with float64), i32,
bool; int, real, flag and dtype are no tensors. Sizes are letters; one that is a product or a sum is
checked when the letters are known. T and N differ between the tensors of a list.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16)  # of the CPU
MAX_ROWS = 2**31 - 1
MAX_TOP_K = 16
LARGE = 2**20  # an axis that no oracle goes along


class Verdict(Enum):
    VALID = "valid"  # must be done, and right
    INVALID = "invalid"  # must be refused
    EITHER = "either"  # may be refused; if done, must be right
    UNSPECIFIED = "unspecified"  # may do anything but harm


@dataclass(frozen=True)
class Rule:
    parameters: dict[str, str]
    conditions: Callable[[dict, dict], Iterator[str]] | None = None  # what is wrong, given sizes
    written: str | None = None  # the argument that the op changes
    plan: tuple[str, ...] = ()  # those of order, inverse and offsets that it must check
    spreads: bool = False  # a value that is not finite may show in all of its token's results
    may_be_zero: tuple[str, ...] = ("T", "N")
    tensors: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        kinds = {n: p for n, p in self.parameters.items() if ":" in p}
        object.__setattr__(self, "tensors", kinds)


def _router_options(a: dict, sizes: dict) -> Iterator[str]:
    k = sizes["k"] if "k" in sizes else a["top_k"]
    if not 1 <= k <= min(sizes["M"], MAX_TOP_K):
        yield f"top_k {k}"
    if a.get("renormalize") and k == 1:
        yield "renormalize with top_k = 1"
    for name in ("calibration", "eps"):
        if name in a and not 0 < a[name] < math.inf:
            yield f"{name} {a[name]}"
    if sizes["T"] * k > MAX_ROWS:
        yield "T * k"


def _permute_sizes(a: dict, sizes: dict) -> Iterator[str]:
    if a["top_k"] < 1 or sizes["T"] * a["top_k"] != sizes["N"]:
        yield "T * top_k"


def _plan_sizes(a: dict, sizes: dict) -> Iterator[str]:
    if not a["experts"]:
        yield "no layer"
    if not 1 <= a["num_experts"] < MAX_ROWS:
        yield "num_experts"


def _wgrad_sizes(a: dict, sizes: dict) -> Iterator[str]:
    grad, input, order, offsets = (a[n] for n in ("grad", "input", "order", "offsets"))
    tops = (a["grad_top_k"], a["input_top_k"])
    gathered = max(tops) > 0
    if not len(grad) == len(input) == len(offsets) > 0:
        yield "number of segments"
        return
    if len(order) != (len(grad) if gathered else 0):
        yield "number of orders"
        return
    if min(tops) < 0 or offsets[0].shape[0] < 2:
        yield "top_k, or no expert"
        return
    for s in range(len(grad)):
        rows = {t.shape[0] * max(k, 1) for t, k in zip((grad[s], input[s]), tops, strict=True)}
        if gathered:
            rows.add(order[s].shape[0])
        if len(rows) > 1 or max(rows) > MAX_ROWS:
            yield f"rows of segment {s}"
    wanted = a.get("out_dtype")
    if wanted not in (None, grad[0].dtype, acc_dtype(grad[0].dtype)):
        yield "out_dtype"


MLP = {
    "weights": "acc: T k", "gate_up": "float: M 2*F D", "down": "float: M D F",
    "order": "i32: T*k", "inverse": "i32: T k", "offsets": "i32: M+1",
}  # fmt: skip
MLP_BWD = {"grad": "float: T D", **MLP, "preact": "float: T*k 2*F"}
WGRAD = {
    "grad": "*float: A n", "input": "*float: B K", "order": "*i32: N", "offsets": "*i32: E",
    "grad_top_k": "int", "input_top_k": "int",
}  # fmt: skip
STEER = {"bias": "?acc: M", "mask": "?bool: M"}
ROUTER_BWD = {"grad_weights": "?acc: T k", "grad_importance": "?acc: M", "logits": "float: T M"}
PLAN = ("order", "inverse", "offsets")
RULES = {
    "router_logits": Rule({"x": "float: T D", "weight": "float: M D"}),
    "router_logits_bwd": Rule({"grad": "acc: T M", "x": "float: T D", "weight": "float: M D"}),
    "norm_topk": Rule(
        {
            "logits": "float: T M", "scale": "acc: ...", "top_k": "int", "calibration": "real",
            "eps": "real", **STEER,
        },
        _router_options,
        spreads=True,
    ),
    "norm_topk_bwd": Rule(
        {
            **ROUTER_BWD, "scale": "acc: ...", "experts": "i32: T k", "calibration": "real",
            "eps": "real", "mask": "?bool: M",
        },
        _router_options,
        spreads=True,
    ),
    "softmax_topk": Rule(
        {"logits": "float: T M", "top_k": "int", "renormalize": "flag", **STEER}, _router_options,
        spreads=True,
    ),
    "softmax_topk_bwd": Rule(
        {**ROUTER_BWD, "experts": "i32: T k", "renormalize": "flag", "mask": "?bool: M"},
        _router_options,
        spreads=True,
    ),
    "dispatch_plan": Rule({"experts": "*i32: T k", "num_experts": "int"}, _plan_sizes),
    "permute": Rule(
        {"x": "float: T D", "order": "i32: N", "top_k": "int"}, _permute_sizes, plan=("order",)
    ),
    "unpermute": Rule(
        {"y": "float: T*k D", "inverse": "i32: T k", "weights": "?acc: T k"}, plan=("inverse",)
    ),
    "unpermute_bwd": Rule(
        {
            "grad": "float: T D", "y": "float: T*k D", "order": "i32: T*k", "inverse": "i32: T k",
            "weights": "acc: T k",
        },
        plan=("order", "inverse"),
    ),
    "grouped_mm": Rule(
        {"a": "float: N K", "b": "float: M n K", "offsets": "i32: M+1"}, plan=("offsets",)
    ),
    "grouped_mm_bwd_a": Rule(
        {"grad": "float: N n", "b": "float: M n K", "offsets": "i32: M+1"}, plan=("offsets",)
    ),
    "grouped_wgrad": Rule({**WGRAD, "out_dtype": "dtype"}, _wgrad_sizes, plan=PLAN),
    "grouped_wgrad_": Rule({"sum": "acc: M n K", **WGRAD}, _wgrad_sizes, "sum", PLAN),
    "expert_mlp": Rule({"x": "float: T D", **MLP, "keep_preact": "flag"}, plan=PLAN),
    "expert_mlp_bwd": Rule(MLP_BWD, plan=PLAN),
    "expert_mlp_bwd_": Rule(MLP_BWD, written="preact", plan=PLAN),
}  # fmt: skip
LOCAL = {"A", "B", "N", "T"}  # differ between the tensors of a list


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def named_tensors(rule: Rule, arguments: dict) -> Iterator[tuple[str, str, Tensor]]:
    """(argument, what the rule says of it, tensor), each tensor of a list by itself."""
    for name, text in rule.tensors.items():
        value = arguments[name]
        for t in value if isinstance(value, list | tuple) else [value]:
            yield name, text, t


# --- judgement


def judge(rule: Rule, arguments: dict) -> tuple[Verdict, str]:
    """Whether a call has to be done or refused, and why."""
    for check in (_types, _places, _dtypes, _sizes, _memory):
        for verdict, reason in check(rule, arguments):
            return verdict, reason
    return _plan_values(rule, arguments)


def _types(rule: Rule, arguments: dict) -> Iterator[tuple[Verdict, str]]:
    for name, text in rule.tensors.items():
        if isinstance(arguments[name], list) != (text[0] == "*"):
            yield Verdict.INVALID, f"{name} is a {type(arguments[name]).__name__}"
    for name, text, t in named_tensors(rule, arguments):
        if t is None and text[0] == "?":
            continue
        if not isinstance(t, Tensor):
            yield Verdict.INVALID, f"{name} is a {type(t).__name__}"
        elif t.layout != torch.strided:
            yield Verdict.INVALID, f"{name} is {t.layout}"
    scalars = {"int": int, "real": float, "flag": bool, "dtype": torch.dtype | None}
    for name, text in rule.parameters.items():
        value, kind = arguments[name], scalars.get(text)
        if kind is None:
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            yield Verdict.UNSPECIFIED, f"{name} is a {type(value).__name__}"  # torch converts some
        elif kind is int and not -(2**63) <= value < 2**63:
            yield Verdict.INVALID, f"{name} has more than 64 bits"


def _dtypes(rule: Rule, arguments: dict) -> Iterator[tuple[Verdict, str]]:
    given = [row for row in named_tensors(rule, arguments) if row[2] is not None]
    floats = [t.dtype for _, text, t in given if re.match(r"[?*]?float", text)]
    first = floats[0] if floats else torch.float32
    if first not in FLOATS:
        yield Verdict.INVALID, f"{first}"
    due = {"float": first, "acc": acc_dtype(first), "i32": torch.int32, "bool": torch.bool}
    for name, text, t in given:
        kind = re.match(r"[?*]?(\w+)", text)[1]
        if t.dtype != due[kind]:
            yield Verdict.INVALID, f"{name} is {t.dtype}"


def sizes_of(rule: Rule, arguments: dict) -> tuple[dict[str, int], list[str]]:
    """The sizes by letter, and what does not fit."""
    sizes, wrong, derived = {}, [], []
    for name, text, t in named_tensors(rule, arguments):
        letters = text.split(": ")[1].split()
        if t is None or letters == ["..."]:
            if t is not None and t.numel() != 1:
                wrong.append(f"{name} has {t.numel()} elements")
            continue
        if t.dim() != len(letters):
            wrong.append(f"{name} has {t.dim()} axes")
            continue
        for letter, size in zip(letters, t.shape, strict=True):
            if not letter.isalpha():
                derived.append((name, letter, size))
            elif text[0] == "*" and letter in LOCAL:
                sizes[letter] = max(size, sizes.get(letter, 0))
            elif sizes.setdefault(letter, size) != size:
                wrong.append(f"{letter} of {name}")
    for name, formula, size in derived:
        if not wrong and _evaluate(formula, sizes) != size:
            wrong.append(f"{formula} of {name}")
    return sizes, wrong


def _evaluate(formula: str, sizes: dict[str, int]) -> int:
    sign = "*" if "*" in formula else "+"
    values = [int(p) if p.isdigit() else sizes[p] for p in formula.split(sign)]
    return math.prod(values) if sign == "*" else sum(values)


def _sizes(rule: Rule, arguments: dict) -> Iterator[tuple[Verdict, str]]:
    sizes, wrong = sizes_of(rule, arguments)
    if "sum" in arguments and not wrong and "E" in sizes and sizes["E"] != sizes["M"] + 1:
        wrong.append("M of sum")
    if not wrong and rule.conditions:
        wrong += rule.conditions(arguments, sizes)
    if wrong:
        yield Verdict.INVALID, wrong[0]
    elif sizes.get("T", 0) * sizes.get("k", 1) > MAX_ROWS or sizes.get("N", 0) > MAX_ROWS:
        yield Verdict.INVALID, "2^31 rows or more"


def _places(rule: Rule, arguments: dict) -> Iterator[tuple[Verdict, str]]:
    given = [t for _, _, t in named_tensors(rule, arguments) if t is not None]
    if len({t.device for t in given}) > 1:
        yield Verdict.INVALID, "several devices"
    elif given and given[0].is_meta:
        yield Verdict.UNSPECIFIED, "shapes alone"


def extent(t: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    size = (last + 1) * t.element_size() if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + size


def _memory(rule: Rule, arguments: dict) -> Iterator[tuple[Verdict, str]]:
    sizes, _ = sizes_of(rule, arguments)
    if rule.written:
        out = arguments[rule.written]
        if out.requires_grad or out.is_neg():  # torch refuses to write there
            yield Verdict.EITHER, f"{rule.written} wants a gradient, or is a negated view"
        if not out.is_contiguous():
            yield Verdict.INVALID, f"{rule.written} is not contiguous"
        begin, end = extent(out)
        for name, _, t in named_tensors(rule, arguments):
            if t is None or name == rule.written:
                continue
            other_begin, other_end = extent(t)
            if begin < other_end and other_begin < end:
                yield Verdict.INVALID, f"{rule.written} overlaps {name}"
    if any(
        max(t.shape, default=0) > LARGE
        for _, _, t in named_tensors(rule, arguments)
        if t is not None
    ):
        yield Verdict.UNSPECIFIED, "too large to tell"
    zero = [n for n, size in sizes.items() if size == 0 and n not in (*rule.may_be_zero, *"AB")]
    if zero:
        yield Verdict.EITHER, f"{zero[0]} = 0"


# --- values of a plan


def _plan_values(rule: Rule, arguments: dict) -> tuple[Verdict, str]:
    segments = {n: arguments.get(n) for n in PLAN if n in rule.plan and n in arguments}
    listed = {n: t if isinstance(t, list) else [t] for n, t in segments.items()}
    count = max((len(ts) for ts in listed.values()), default=0)
    loose = ""
    for s in range(count):
        plan = {n: ts[s] for n, ts in listed.items() if ts}
        rows = plan["order"].numel() if "order" in plan else plan.get("inverse", Tensor()).numel()
        if "order" not in plan and "inverse" not in plan:
            rows = next(t for n, t in arguments.items() if n in ("a", "grad"))
            rows = (rows[s] if isinstance(rows, list) else rows).shape[0]
        if wrong := _out_of_range(plan, rows):
            return Verdict.INVALID, wrong
        loose = loose or _inconsistent(plan)
    return (Verdict.UNSPECIFIED, loose) if loose else (Verdict.VALID, "")


def _out_of_range(plan: dict[str, Tensor], rows: int) -> str:
    valid = rows
    if "offsets" in plan:
        bounds = plan["offsets"].tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > rows:
            return "offsets"
        valid = bounds[-1]
    if "order" in plan:
        head = plan["order"][:valid]
        lowest = 0 if "offsets" in plan else -1
        if ((head < lowest) | (head >= rows)).any():
            return "order"
    if "inverse" in plan and ((plan["inverse"] < -1) | (plan["inverse"] >= rows)).any():
        return "inverse"
    return ""


def _inconsistent(plan: dict[str, Tensor]) -> str:
    """In range, but no plan: what the op then gives is nobody's concern."""
    order, inverse, offsets = (plan.get(n) for n in PLAN)
    if order is not None:
        valid = int(offsets[-1]) if offsets is not None else int((order >= 0).sum())
        slots = order[:valid].long()
        if (order[valid:] != -1).any() or slots.unique().numel() != valid:
            return "order is no permutation"
        if inverse is not None:
            due = torch.full((inverse.numel(),), -1, dtype=torch.int32)
            due[slots] = torch.arange(valid, dtype=torch.int32)
            if not torch.equal(due, inverse.flatten()):
                return "inverse is not that of order"
    return ""
