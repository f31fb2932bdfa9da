# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of README.md and docs/ from the JSON files under bench/results.

    python bench/update_docs.py [--check]

With --check nothing is written; the exit status says whether all pages are up to date.
"""

import argparse
import json
import sys
from pathlib import Path

import hardware_table
from evidence_tables import evidence
from kernel_tables import expectations
from model_memory import choosing

from unipool.report.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->\n"
MAIN_LAYERS = 12  # of the pool step's first table


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def demo() -> str:
    rows = [
        [
            run["name"],
            f"{run['num_pools']} × {run['pool_size']}",
            f"{run['params_total'] / 1e6:.2f}M",
            f"{run['params_expert'] / 1e6:.2f}M",
            f"{run['val_loss']:.4f}",
            f"{run['val_bits_per_byte']:.4f}",
            f"{run['tokens_per_second']:,.0f}",
        ]
        for run in load("demo")["runs"]
    ]
    head = ["model", "pools × experts", "parameters", "of experts"]
    head += ["validation loss (nats)", "bits per byte", "tokens/s"]
    return (
        "## The demo\n\n`make demo`, seed 0: three models of equal active size on the source of "
        "Python's standard library,\nbyte by byte. Small models, little training, one seed: a "
        "small difference says nothing about models of another size.\n\n" + markdown(head, rows)
    )


def time_of(case: dict, name: str) -> dict | None:
    return next((t for t in case["timings"] if t["name"] == name), None)


def milliseconds(timing: dict) -> str:
    low, mid, high = (f"{1e3 * timing[key]:.0f}" for key in ("p10", "median", "p90"))
    return f"{mid} [{low}, {high}]"


def pool_step() -> str:
    cases = load("pool_step_cpu")["results"]
    main = [case for case in cases if case["layers"] == MAIN_LAYERS]
    c = main[0]
    head = [""]
    for case in main:
        head += [f"{case['dtype']} (ms)", "to deferred"]
    rows = []
    for timing in c["timings"]:
        row = [timing["name"]]
        for case in main:
            row.append(milliseconds(time_of(case, timing["name"])))
            row.append(f"{case['ratio_to_ours'][timing['name']]:.2f}x")
        rows.append(row)
    floor = ["floor"]
    for case in main:
        floor += [f"{1e3 * case['floor']:.0f}", f"{1 / case['ours_over_floor']:.2f}x"]
    text = (
        f"## The pool step\n\n`python bench/pool_step.py`: {c['layers']} layers of norm, router "
        f"and one shared pool, forward and backward;\nT {c['tokens']}, D {c['d_model']}, "
        f"F {c['d_ff']}, M {c['experts']}, k {c['top_k']}. Median [p10, p90]. The floor is "
        "max(FLOPs / matmul rate, bytes / read bandwidth)\nof each pass, rates and bandwidth "
        "measured in the same run.\n\n"
    )
    text += markdown(head, [*rows, floor])
    sweep = [
        [
            case["dtype"],
            str(case["layers"]),
            f"{1e3 * time_of(case, 'unipool deferred')['median'] / case['layers']:.1f}",
            f"{1e3 * time_of(case, 'grouped_mm')['median'] / case['layers']:.1f}",
            f"{case['ratio_to_ours']['grouped_mm']:.2f}x",
            f"{case['ours_over_floor']:.2f}x",
        ]
        for case in cases
    ]
    head = [
        "",
        "layers",
        "ours (ms per layer)",
        "grouped_mm (ms per layer)",
        "ratio",
        "ours to floor",
    ]
    text += "\nBy the number of layers that share the pool:\n\n" + markdown(head, sweep)
    return text + "\n" + pool_step_parts()


def pool_step_parts() -> str:
    cases = load("pool_step_parts")["results"]
    parts = cases[0]["share"]
    rows = [[case["dtype"], *(f"{case['share'][part]:.1%}" for part in parts)] for case in cases]
    return (
        "Where the time of the step goes, weight gradients deferred, as shares of the processor "
        "time on one thread\n(`python bench/pool_step_parts.py`):\n\n"
        + markdown(["", *parts], rows)
    )


def single_ops() -> str:
    f32, bf16, router = (result["ratio"] for result in load("ops_cpu")["results"][:3])
    return (
        f"## Single ops\n\n`make bench`, same shape: `expert_mlp` forward {f32:.1f}x (float32) and "
        f"{bf16:.1f}x (bfloat16) faster than sort,\ngather, `grouped_mm`, SwiGLU and scatter; "
        f"`norm_topk` forward and backward {router:.1f}x faster than the eager formula.\n"
    )


def integration() -> str:
    results = load("integration")["results"]
    peers = ("eager", "grouped_mm")
    rows = []
    for r in results:
        sizes = f"{r['d_model']}, {r['d_ff']}, {r['experts']}, {r['top_k']}"
        ratios = [f"{r['ratio_to_ours'][peer]:.1f}x" for peer in peers]
        rows.append([r["case"], sizes, str(r["T"]), r["dtype"], *ratios])
    head = ["", "D, F, experts, k", "tokens", "dtype", *(f"`{peer}`" for peer in peers)]
    return (
        "## Under Hugging Face models\n\n`python bench/bench_integration.py`: how much longer the "
        f"MoE blocks of {results[0]['layers']} layers take with\nother experts implementations "
        f"than with `unipool`; transformers {results[0]['transformers']}.\n\n"
        + markdown(head, rows)
    )


def precision() -> str:
    errors = {r["layers"]: r["error"] for r in load("wgrad_precision")["results"]}
    layers = ", ".join(map(str, errors))
    deferred, autograd = (
        ", ".join(f"{e[mode]:.1e}" for e in errors.values()) for mode in ("deferred", "autograd")
    )
    return (
        f"## Precision\n\n`python bench/wgrad_precision.py`: relative error of a bfloat16 weight "
        f"gradient over L = {layers} layers\nagainst the float64 sum: deferred {deferred}; "
        f"autograd's own additions {autograd}.\n"
    )


def machine() -> str:
    torch = load("pool_step_cpu")["environment"]["torch"].split("+")[0]
    return f"two cores of an AMD EPYC processor with AVX-512, torch {torch}"


def benchmarks() -> str:
    head = (
        f"All on {machine()}; each comes from a JSON under `bench/results/`\nthrough "
        "`bench/update_docs.py`. Times of shared machines vary: the ratios, measured in one run, "
        "are what counts.\n"
    )
    return "\n".join([head, demo(), pool_step(), single_ops(), integration(), precision()])


def summary() -> str:
    """The README's table: how many times faster, one line per claim."""
    steps = {c["dtype"]: c for c in load("pool_step_cpu")["results"] if c["layers"] == MAIN_LAYERS}
    f32, bf16, router = (result["ratio"] for result in load("ops_cpu")["results"][:3])

    def step(peer: str) -> list[str]:
        return [f"{steps[d]['ratio_to_ours'][peer]:.1f}x" for d in ("float32", "bfloat16")]

    def training(model: str, peer: str) -> list[str]:
        found = {r["dtype"]: r for r in load("integration")["results"] if r["case"] == model}
        return [f"{found[d]['ratio_to_ours'][peer]:.1f}x" for d in ("float32", "bfloat16")]

    case = steps["float32"]
    pool = f"{case['layers']} layers on one pool of {case['experts']} experts, forward and backward"
    mixtral, qwen = (f"{name} training step" for name in ("mixtral", "qwen3_moe"))
    rows = [
        [pool, "torch's `grouped_mm`", *step("grouped_mm")],
        ["the same", "our ops, L dense weight gradients", *step("unipool autograd")],
        [
            "`expert_mlp`, forward",
            "sort, gather, `grouped_mm`, SwiGLU",
            f"{f32:.1f}x",
            f"{bf16:.1f}x",
        ],
        ["`norm_topk`, forward and backward", "the eager formula", f"{router:.1f}x", ""],
        ["MoE blocks of a Mixtral, training", "transformers' `eager`", *training(mixtral, "eager")],
        ["the same", "transformers' `grouped_mm`", *training(mixtral, "grouped_mm")],
        ["MoE blocks of a Qwen3-MoE, training", "the same", *training(qwen, "grouped_mm")],
    ]
    return (
        f"How many times faster, on {machine()}:\n\n"
        + markdown(["what", "than", "float32", "bfloat16"], rows)
        + "\nSizes, spreads, floors, and the losses of the demo's models: "
        "[docs/benchmarks.md](docs/benchmarks.md).\n"
    )


def fuzzing() -> str:
    run = load("fuzz")
    keys = ["calls", "compared", "refused", "done", "finding"]
    rows = [
        [f"`{name}`", *(f"{count[key]:,}" for key in keys)] for name, count in run["ops"].items()
    ]
    rows.append(["all", *(f"{run[key]:,}" for key in keys)])
    full = {"asan": "AddressSanitizer", "ubsan": "UBSan"}
    under = "".join(f", {full[name]}" for name in run["sanitizers"])
    command = f"python bench/fuzz.py --calls {run['calls']} --seed {run['seed']}"
    return (
        f"`{command}`, on {run['processor']}{under}, torch {run['torch']}, in "
        f"{run['seconds']:,.0f} s:\n\n"
        + markdown(["op", "calls", "compared", "refused", "done", "findings"], rows)
    )


def updated(path: Path, texts: dict[str, str]) -> str:
    """The text of `path` with each of `texts` between the marks of its name."""
    page = path.read_text()
    for name, text in texts.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            sys.exit(f"{path.name}: no {begin.strip()} and {end.strip()}")
        page = before + begin + text + end + after
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    docs = ROOT / "docs"
    pages = {
        ROOT / "README.md": {"figures": summary()},
        docs / "benchmarks.md": {"figures": benchmarks()},
        docs / "choosing.md": choosing(load("pool_step_cpu")),
        docs / "cuda-kernels.md": expectations(load("tile_efficiency")),
        docs / "evidence.md": {"figures": evidence(load("evidence"))},
        docs / "reliability.md": {"fuzz": fuzzing()},
    }
    texts = {path: updated(path, parts) for path, parts in pages.items()}
    page = hardware_table.PAGE.read_text()
    try:
        texts[hardware_table.PAGE] = hardware_table.updated(page, hardware_table.committed_runs())
    except hardware_table.RefusedError as error:
        sys.exit(f"update_docs: {error}")
    for path, text in texts.items():
        if not arguments.check:
            path.write_text(text)
        elif text != path.read_text():
            sys.exit(f"{path.name}: run bench/update_docs.py")


if __name__ == "__main__":
    main()
