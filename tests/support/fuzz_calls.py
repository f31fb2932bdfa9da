# SPDX-License-Identifier: Apache-2.0
"""One random call of one op, all of it told by a seed, and the judgement of what became of it.

A raw op (`unipool::name`) gets valid arguments of random sizes, of which up to three are spoilt; by
fuzz_rules.py the call must then be refused, or give what fuzz_oracles.py says. A public op (`name`)
is run forward and backward by its specification, in odd layouts and for any of its gradients, or
with one of the malformed arguments of bad_calls.py.
"""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import bad_calls
import fuzz_oracles
import torch
from cases import Case, acc_dtype, expert_ids, logits, plan, pool, rand, weights
from fuzz_rules import FLOATS, RULES, Rule, Verdict, judge, named_tensors
from fuzz_spoils import LAYOUTS, SPOILS
from specs import SPECS, OpSpec, Tolerance, oracle, run, upstream
from tolerance import check_close, check_equal, check_results
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from unipool import ops

VARIANT = re.compile("_(steered|renormalized|weighted)$")  # of an op's specification
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
LONGEST_MESSAGE = 400  # characters
# What torch itself says, in lines of its own: a value that does not fit the schema; a layout or a
# quantized type that no op of ours was written for; memory that is not there.
OF_TORCH = re.compile(
    r"unipool::\w+\(\) |Could not run 'unipool::|.*(DefaultCPUAllocator|not enough memory)|"
    r"Overloaded torch operator|Storage size calculation overflowed|There were no tensor arguments"
)


class FindingError(Exception):
    """A call that did something else than it has to."""


@dataclass(frozen=True)
class Target:
    """An op: its call, rule and oracle; or the specifications of a public op."""

    name: str
    call: Callable[..., object]
    rule: Rule | None = None
    oracle: Callable[..., list] | None = None
    specs: tuple[OpSpec, ...] = ()


def raw_targets() -> dict[str, Target]:
    return {
        f"unipool::{name}": Target(
            f"unipool::{name}",
            getattr(torch.ops.unipool, name),
            rule,
            getattr(fuzz_oracles, name),
        )
        for name, rule in RULES.items()
    }


def public_targets() -> dict[str, Target]:
    found = {}
    for name in ops.__all__:
        if not isinstance(getattr(ops, name), type):
            specs = tuple(s for s in SPECS if VARIANT.sub("", s.name) == name)
            found[name] = Target(name, getattr(ops, name), specs=specs)
    return found


def uncovered(targets: dict[str, Target]) -> list[str]:
    """Ops of the library, and public ones, that no target calls."""
    names = torch._C._dispatch_get_all_op_names()
    of_library = {n.split(".")[0] for n in names if n.startswith("unipool::")}
    in_cpp = {n for n in of_library if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")}
    bare = [name for name, target in targets.items() if not target.rule and not target.specs]
    return sorted((in_cpp - targets.keys()) | set(bare))


# --- arguments


def random_case(rng: random.Random, seed: int) -> Case:
    """Small, with the sizes at which loops begin and end more often than chance has it."""
    M = rng.choice([1, 2, 3, rng.randint(1, 12), rng.choice([32, 33, 64, 96, 160, 257])])
    edges = [16, 17, 31, 64, 65, 130] if M <= 12 else [16, 17]
    return Case(
        "fuzz",
        tokens=rng.choice([0, 1, 2, rng.randint(0, 9), rng.randint(0, 40), rng.randint(0, 200)]),
        experts=M,
        top_k=rng.randint(1, min(M, 16)),
        d_model=rng.choice([1, 2, rng.randint(1, 40), rng.choice(edges)]),
        d_ff=rng.choice([1, 2, rng.randint(1, 40), rng.choice(edges)]),
        routing=rng.choice(["uniform", "zipf", "one", "dropped", "none"]),
        logits=rng.choice(["normal", "ties", "dead"]),
        seed=seed,
    )


def _router_arguments(op: str, case: Case, dtype: torch.dtype, rng: random.Random) -> dict:
    acc, M = acc_dtype(dtype), case.experts
    bias = rand(case, "bias", M).mul(4).round().mul(torch.pi / 12).to(acc)
    z, ids = logits(case, dtype), expert_ids(case)
    grads = {
        "grad_weights": upstream(case, "weights", torch.empty(ids.shape, dtype=acc)),
        "grad_importance": upstream(case, "importance", torch.empty(M, dtype=acc)),
    }
    arguments = {
        **{name: rng.choice([grad, grad, None]) for name, grad in grads.items()},
        "logits": z,
        "scale": torch.tensor(1.25, dtype=acc),
        "experts": ids,
        "top_k": case.top_k,
        "calibration": rng.choice([3.0, 1.0, 0.5]),
        "eps": 1e-8,
        "renormalize": case.top_k > 1 and rng.random() < 0.5,
        "bias": rng.choice([None, bias]),
        "mask": rng.choice([None, torch.rand(M, generator=case.generator("mask")) < 0.25]),
    }
    return {name: arguments[name] for name in RULES[op].parameters}


def _wgrad_arguments(op: str, case: Case, dtype: torch.dtype, rng: random.Random) -> dict:
    """One to three layers, either operand or none gathered by token."""
    p, k, N = plan(case), case.top_k, case.tokens * case.top_k
    segments = range(rng.randint(1, 3))
    tops = rng.choice([(0, 0), (k, 0), (0, k), (k, k)])
    rows = [case.tokens if top else N for top in tops]
    widths = (case.d_model, case.d_ff)
    grad, input = (
        [rand(case, f"{what}{s}", n, width).to(dtype) for s in segments]
        for what, n, width in zip(("grad", "input"), rows, widths, strict=True)
    )
    arguments = {"grad": grad, "input": input, "order": [p.order for _ in segments if any(tops)]}
    arguments |= {"offsets": [p.offsets.clone() for _ in segments]}
    arguments |= {"grad_top_k": tops[0], "input_top_k": tops[1]}
    if op == "grouped_wgrad_":
        total = rand(case, "sum", case.experts, *widths).to(acc_dtype(dtype))
        return {"sum": total, **arguments}
    return {**arguments, "out_dtype": rng.choice([None, dtype, acc_dtype(dtype)])}


def _other_arguments(op: str, case: Case, dtype: torch.dtype, rng: random.Random) -> dict:
    T, M, k, D, F = case.tokens, case.experts, case.top_k, case.d_model, case.d_ff
    by_name = {
        "x": lambda: rand(case, "x", T, D).to(dtype),
        "y": lambda: rand(case, "y", T * k, D).to(dtype),
        "a": lambda: rand(case, "a", T * k, D).to(dtype),
        "b": lambda: rand(case, "b", M, F, D, std=D**-0.5).to(dtype),
        "weight": lambda: rand(case, "router", M, D, std=D**-0.5).to(dtype),
        "grad": lambda: rand(case, "grad", T, D).to(dtype),
        "weights": lambda: weights(case, dtype),
        "gate_up": lambda: pool(case, dtype)[0],
        "down": lambda: pool(case, dtype)[1],
        "preact": lambda: rand(case, "preact", T * k, 2 * F).to(dtype),
        "keep_preact": lambda: rng.random() < 0.5,
        "experts": lambda: [expert_ids(case, layer) for layer in range(rng.randint(1, 3))],
        "num_experts": lambda: M,
        "top_k": lambda: k,
        **{name: lambda t=t: t for name, t in plan(case)._asdict().items()},
    }
    if op == "grouped_mm_bwd_a":
        by_name["grad"] = lambda: rand(case, "grad", T * k, F).to(dtype)
    if op == "router_logits_bwd":
        by_name["grad"] = lambda: rand(case, "grad", T, M).to(acc_dtype(dtype))
    if op == "unpermute":
        by_name["weights"] = lambda: rng.choice([None, weights(case, dtype)])
    return {name: by_name[name]() for name in RULES[op].parameters}


def valid_arguments(op: str, case: Case, dtype: torch.dtype, rng: random.Random) -> dict:
    if "topk" in op:
        return _router_arguments(op, case, dtype, rng)
    if "wgrad" in op:
        return _wgrad_arguments(op, case, dtype, rng)
    return _other_arguments(op, case, dtype, rng)


# --- one call


def run_call(target: Target, seed: int) -> str:
    """ "refused", "compared", or "done" (no result is specified); raises FindingError."""
    rng = random.Random(f"{target.name} {seed}")
    torch.set_num_threads(1)  # but for the call itself
    torch.utils.deterministic.fill_uninitialized_memory = rng.random() < 0.5
    torch.use_deterministic_algorithms(True, warn_only=True)  # or memory is not filled
    return run_raw(target, seed, rng) if target.rule else run_public(target, seed, rng)


def run_raw(target: Target, seed: int, rng: random.Random) -> str:
    case, dtype = random_case(rng, seed), rng.choice(FLOATS)
    arguments = valid_arguments(target.name.split("::")[1], case, dtype, rng)
    notes = [str(case.__dict__), str(dtype)]
    for _ in range(rng.choice([0, 0, 1, 1, 1, 1, 2, 3])):
        spoil = rng.choice(SPOILS)
        notes.append(f"{spoil.__name__}({spoil(arguments, target.rule, rng)})")
    try:
        return check_raw(target, arguments, rng)
    except FindingError as finding:
        raise FindingError(f"{finding}; {'; '.join(notes)}") from None


@contextmanager
def threads(rng: random.Random) -> Iterator[None]:
    torch.set_num_threads(rng.choice([1, 1, 2, 3]))
    try:
        yield
    finally:
        torch.set_num_threads(1)


def check_raw(target: Target, arguments: dict, rng: random.Random) -> str:
    verdict, reason = judge(target.rule, arguments)
    due = None
    if verdict in (Verdict.VALID, Verdict.EITHER):
        due = target.oracle(**tree_map_only(Tensor, exact, arguments))
    before = snapshot(arguments)
    try:
        with threads(rng):
            results = target.call(*arguments.values())
    except BaseException as error:
        on_meta = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(arguments))
        check_refusal(error, verdict, on_meta)
        check_unchanged(before, arguments, None)
        return "refused"
    check_unchanged(before, arguments, target.rule.written)
    if verdict is Verdict.INVALID:
        raise FindingError(f"accepted, though {reason}")
    if due is None:
        return "done"
    dtype = first_float(target.rule, arguments)
    got = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
    if target.rule.written:
        got.append(arguments[target.rule.written])
    compare(got, due, dtype, not_finite(arguments) if target.rule.spreads else None)
    return "compared"


def not_finite(arguments: dict) -> Tensor:
    """[T]: of the tokens of a router, those that a value which is not finite reaches: one of their
    own rows, or one that is every token's."""
    given = [t for t in arguments.values() if isinstance(t, Tensor) and t.is_floating_point()]
    T = arguments["logits"].shape[0]
    reached = torch.zeros(T, dtype=torch.bool)
    for t in given:
        lost = ~t.detach().isfinite()
        reached |= lost.any(1) if t.dim() == 2 else lost.any()
    return reached


def exact(t: Tensor) -> Tensor:
    t = t.detach().resolve_neg().contiguous()
    return t.double() if t.is_floating_point() else t.clone()


def first_float(rule: Rule, arguments: dict) -> torch.dtype:
    given = [t for _, text, t in named_tensors(rule, arguments) if "float" in text]
    return next((t.dtype for t in given if t is not None), torch.float32)


def check_refusal(error: BaseException, verdict: Verdict, on_meta: bool = False) -> None:
    """On the meta device nothing is checked, so a fake may fail at what is not there."""
    message = str(error).strip()
    said = f"{type(error).__name__}: {message[:LONGEST_MESSAGE]}"
    if not isinstance(error, REFUSALS) and not (on_meta and isinstance(error, Exception)):
        raise FindingError(f"raised {said}")
    if verdict is Verdict.VALID and not OF_TORCH.match(message):
        raise FindingError(f"refused, though valid: {said}")
    one_line = message and "\n" not in message and len(message) <= LONGEST_MESSAGE
    if not one_line and not OF_TORCH.match(message):
        raise FindingError(f"refused in more than one clear line: {said}")


def _bits(t: Tensor) -> Tensor | None:
    """A copy of the bits of a small tensor that has memory."""
    if t.is_meta or t.layout != torch.strided or t.numel() > 2**22:
        return None
    t = t.detach().resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)
    return t.view(-1).view(torch.uint8)


def snapshot(arguments: dict) -> dict[str, list]:
    return {
        name: [(t, _bits(t)) for t in tree_leaves(value) if isinstance(t, Tensor)]
        for name, value in arguments.items()
    }


def check_unchanged(before: dict[str, list], arguments: dict, written: str | None) -> None:
    for name, tensors in before.items():
        for t, bits in tensors:
            if name != written and bits is not None and not torch.equal(_bits(t), bits):
                raise FindingError(f"changed {name}")


def compare(got: list[Tensor], due: list, dtype: torch.dtype, reached: Tensor | None) -> None:
    """reached: the tokens whose rows may be not finite where the oracle's are; None for none."""
    if len(got) != len(due):
        raise FindingError(f"{len(got)} results, {len(due)} are due")
    for i, (result, (value, reduction, roundings, magnitude)) in enumerate(
        zip(got, due, strict=True)
    ):
        try:
            if not value.is_floating_point():
                check_equal(result, value, f"result {i}")
                continue
            got_i, want, size = finite_alike(result, value, magnitude, dtype, reached)
            tolerance = Tolerance(reduction, roundings)
            check_close(got_i, want, tolerance, dtype, f"result {i}", size)
        except AssertionError as error:
            raise FindingError(str(error)) from None


def finite_alike(
    got: Tensor, want: Tensor, size: Tensor | float, dtype: torch.dtype, reached: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both with 0 in the rows that are not finite throughout, which are the same in both, and the
    magnitude of each row: never so small that its roundings are below the smallest normal numbers,
    which is where terms may vanish."""
    assert got.shape == want.shape, f"{list(got.shape)}, expected {list(want.shape)}"
    got, want = got.detach().double(), want.detach()
    lost, shown = ~want.isfinite(), ~got.isfinite()
    if want.dim() > 1:
        lost, shown = lost.any(-1, keepdim=True), shown.any(-1, keepdim=True)
    if reached is not None:  # what sums over tokens may show any of them
        of_tokens = want.dim() == 2 and want.shape[0] == len(reached)
        lost = lost | (shown & (reached.unsqueeze(1) if of_tokens else reached.any()))
    assert torch.equal(shown, lost), "finite in other rows than the oracle's"
    got, want = got.masked_fill(lost, 0.0), want.masked_fill(lost, 0.0)
    size = torch.as_tensor(size).double().detach().nan_to_num(0.0, 0.0, 0.0).expand_as(want)
    by_row = size.reshape(-1, 1 if size.dim() <= 1 else size.shape[-1]) if size.numel() else size
    least = torch.finfo(acc_dtype(dtype)).tiny / torch.finfo(acc_dtype(dtype)).eps
    return got, want, by_row.amax(-1).clamp(min=least) if size.numel() else size


# --- public ops


def run_public(target: Target, seed: int, rng: random.Random) -> str:
    if rng.random() < 0.4:
        return run_malformed(target, rng)
    spec, dtype = rng.choice(target.specs), rng.choice(FLOATS)
    case = random_case(rng, seed)
    if "renormalized" in spec.name and case.top_k == 1:
        return "done"
    plain = spec.inputs(case, dtype)
    inputs = {
        n: t if n in ("top_k", "num_experts") else rng.choice(LAYOUTS)(t) for n, t in plain.items()
    }
    wrt = tuple(n for n in spec.differentiable if rng.random() < 0.7)
    before = snapshot(inputs)
    try:
        with threads(rng):
            actual = run(spec, case, _Module(target), inputs, wrt)
        check_unchanged(before, inputs, None)
        due = oracle(spec, case, plain)
        due |= {f"grad_{n}": None for n in spec.differentiable if n not in wrt}
        for name in [n for n, value in due.items() if value is None]:
            if actual.pop(name) is not None:
                raise FindingError(f"{name}: nobody asked for it")
            due.pop(name)
        check_results(spec, case, plain, actual, due, dtype)
    except (AssertionError, FindingError, *REFUSALS) as error:
        raise FindingError(f"{error}; {spec} {case.__dict__} {dtype} wrt {wrt}") from None
    return "compared"


class _Module:
    """unipool.ops with the target in the place of its own."""

    def __init__(self, target: Target):
        self.target = target

    def __getattr__(self, name: str) -> object:
        return self.target.call if name == self.target.name else getattr(ops, name)


def run_malformed(target: Target, rng: random.Random) -> str:
    rows = [row for row in bad_calls.all_rows() if row[0] == target.name]
    op, name, spoil, _ = rng.choice(rows)
    arguments = bad_calls.valid_arguments()[op]
    arguments[name] = spoil(arguments[name])
    before = snapshot(arguments)
    try:
        bad_calls.call(op, arguments, torch.ops.unipool)
    except BaseException as error:
        check_refusal(error, Verdict.INVALID)
        check_unchanged(before, arguments, None)
        return "refused"
    raise FindingError(f"accepted a malformed {name}")
