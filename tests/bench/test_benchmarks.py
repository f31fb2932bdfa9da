# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that bench/gpu_check.sh runs: bytes, verdicts, times."""

import bench_experts
import bench_kernels
import harness
import pytest
import torch


def nbytes(values: list) -> int:
    """Of all tensors in a list, and of those in lists in it."""
    sizes = [nbytes(v) if isinstance(v, list) else getattr(v, "nbytes", 0) for v in values]
    return sum(sizes)


@pytest.mark.parametrize("call", bench_kernels.all_calls(), ids=lambda c: c.name)
def test_necessary_bytes_are_those_of_the_tensors(call: bench_kernels.Call) -> None:
    """At 64 tokens: what goes in and comes out, without what the op has no use for."""
    tokens = 64
    k = call.shape.get("k", 1)
    formulas = {
        "norm_topk": lambda: bench_kernels.topk_bytes(tokens, call.shape["M"], k),
        "norm_topk_bwd": lambda: bench_kernels.topk_bwd_bytes(tokens, call.shape["M"], k),
        "dispatch_plan": lambda: bench_kernels.plan_bytes(
            tokens * call.shape["layers"], call.shape["M"]
        ),
        "permute": lambda: bench_kernels.permute_bytes(tokens, k, bench_kernels.WIDTH),
        "unpermute": lambda: bench_kernels.unpermute_bytes(tokens, k, bench_kernels.WIDTH),
        "unpermute_bwd": lambda: bench_kernels.unpermute_bwd_bytes(tokens, k, bench_kernels.WIDTH),
    }
    formula = formulas[call.op.replace("softmax", "norm")]
    arguments = call.arguments(tokens)
    total = nbytes(arguments) + nbytes(bench_kernels.run_call(call, arguments))
    scalars = 4 * ({"norm_topk": 1, "norm_topk_bwd": 2}.get(call.op, 0))
    assert formula().necessary == total - scalars


def test_bytes_of_the_documented_shapes() -> None:
    """The figures of docs/cuda-kernels.md, in MB."""
    b = bench_kernels
    documented = [
        (b.topk_bytes(65536, 384, 1), 101.2, 103.6),
        (b.topk_bytes(65536, 96, 8), 29.4, 30.0),
        (b.topk_bwd_bytes(65536, 384, 1), 201.9, 201.9),
        (b.topk_bwd_bytes(65536, 96, 8), 54.5, 54.5),
        (b.plan_bytes(65536, 384), 0.8, 1.8),
        (b.plan_bytes(524288, 384), 6.3, 11.6),
        (b.permute_bytes(65536, 1, 1024), 268.7, 268.7),
        (b.permute_bytes(65536, 2, 1024), 403.2, 537.4),
        (b.unpermute_bytes(65536, 1, 1024), 269.0, 269.0),
        (b.unpermute_bytes(65536, 2, 1024), 403.7, 403.7),
        (b.unpermute_bwd_bytes(65536, 2, 1024), 673.2, 673.2),
    ]
    for traffic, necessary, moved in documented:
        got = (round(traffic.necessary / 1e6, 1), round(traffic.moved / 1e6, 1))
        assert got == (necessary, moved)


def test_verdicts() -> None:
    router, plan = bench_kernels.router_calls(96, 8)[0], bench_kernels.plan_call(96, 1)
    assert [bench_kernels.judge(router, 10.0, s) for s in (0.85, 0.84)] == ["pass", "short"]
    assert [bench_kernels.judge(plan, us, 0.0) for us in (30.0, 30.1)] == ["pass", "short"]
    assert bench_kernels.judge(bench_kernels.plan_call(96, 12), 99.0, 0.0) == "-"


def test_expert_benchmark_runs_on_the_cpu(capsys: pytest.CaptureFixture) -> None:
    result = bench_experts.bench(bench_experts.SMALL, 2, "cpu", compiler="eager")
    assert [p["pass"] for p in result["products"]] == ["forward", "dgrad", "wgrad"]
    assert all(p["share_of_floor"] > 0 for p in result["products"])
    assert [t["name"] for t in result["layer"]] == [
        "unipool",
        "grouped_mm, eager glue",
        "eager loop",
        "dense matmul, equal FLOPs",
    ]
    assert "T=96 D=32 F=48 M=6 k=2" in capsys.readouterr().out


@pytest.mark.parametrize("spoilt", bench_experts.PARAMETERS)
def test_expert_benchmark_times_nothing_that_differs(spoilt: str) -> None:
    shape, place = bench_experts.SMALL, bench_experts.PARAMETERS.index(spoilt)
    step = bench_experts.layer_step(
        bench_experts.ops.expert_mlp, bench_experts.make_inputs(shape, "cpu", "zipf")
    )

    def wrong() -> tuple[torch.Tensor, ...]:
        return tuple(t.roll(1, 0) if n == place else t for n, t in enumerate(step()))

    bench_experts.check({"ours": step, "same": step})
    with pytest.raises(RuntimeError, match=f"^wrong: {spoilt}: relative error .*, not timed$"):
        bench_experts.check({"ours": step, "wrong": wrong})


def test_verdicts_of_the_expert_benchmark() -> None:
    first, small = bench_experts.SHAPES[0], bench_experts.SMALL
    judge = bench_experts.judge
    assert [judge(first, "forward", s) for s in (0.55, 0.54)] == ["pass", "short"]
    assert judge(first, "dgrad", 0.1) == judge(small, "forward", 0.1) == "-"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_times_of_a_cuda_call_are_taken_by_events() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    found, host_share = harness.interleave_on_gpu(ways, warmup=1, runs=3)
    assert "".join(calls) == "ab" + "ababab"
    assert [(t.name, t.runs) for t in found] == [("a", 3), ("b", 3)]
    assert all(t.median >= 0 for t in found)
    assert host_share > 0


def test_relative_error_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PIECE", 7)
    wanted = torch.randn(5, 9)
    got = wanted + 0.01 * torch.randn(5, 9)
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert harness.relative_error(got, wanted) == pytest.approx(error.item(), rel=1e-12)
    assert harness.relative_error(wanted.bfloat16(), wanted.bfloat16()) == 0
    with pytest.raises(ValueError, match=r"shapes \[5, 9\] and \[1, 9\]"):
        harness.relative_error(got, wanted[:1])
