# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/cuda-kernels.md that say what is expected of the expert products."""

from unipool.report.tables import markdown

SHOWN = {  # name -> tokens
    "182m": (8192, 131072),
    "469m": (65536,),
    "650m": (16384,),
    "830m": (8192, 32768),
    "978m": (16384,),
    "SonicMoE 7B, k 8": (24576,),
    "SonicMoE 30B, F 1024": (32768,),
    "Qwen3-30B-A3B": (8192, 32768),
    "OLMoE": (32768,),
    "Mixtral 8x7B": (8192,),
}
BY_ROUTING = ("182m", "830m", "978m", "SonicMoE 7B, k 8")


def expectations(content: dict) -> dict[str, str]:
    """Both tables from tile_efficiency.json."""
    return {"passes": _passes(content["results"]), "routings": _routings(content["results"])}


def _title(result: dict) -> str:
    k = "" if "k " in result["name"] else f", k {result['top_k']}"
    return f"{result['name']}, T {result['tokens']}{k}"


def _shown(results: list[dict], routing: str) -> list[dict]:
    return [
        r for r in results if r["routing"] == routing and r["tokens"] in SHOWN.get(r["name"], ())
    ]


def _passes(results: list[dict]) -> str:
    rows = []
    for result in _shown(results, "uniform"):
        for i, one in enumerate(result["passes"]):
            parts = one["products"]
            layers = f" of {result['layers']} layers" if result["layers"] > 1 else ""
            rows.append(
                [
                    _title(result) if i == 0 else "",
                    one["pass"] + (layers if one["pass"] == "wgrad" else ""),
                    f"{sum(p['flops'] for p in parts) / 1e12:.2f}",
                    f"{sum(p['bytes'] for p in parts) / 1e9:.2f}",
                    f"{1e3 * one['floor_seconds']:.2f} ({one['floor_bound']})",
                    "/".join(dict.fromkeys(p["tile"] for p in parts)),
                    f"{min(p['tile_efficiency'] for p in parts):.0%}",
                    f"{1e3 * one['predicted_seconds']:.2f}",
                ]
            )
    head = ["shape", "pass", "TFLOP", "GB", "floor, ms", "tile", "useful", "predicted, ms"]
    return markdown(head, rows)


def _routings(results: list[dict]) -> str:
    routings = list(dict.fromkeys(r["routing"] for r in results))
    largest = {name: max(SHOWN[name]) for name in BY_ROUTING} | {"830m": min(SHOWN["830m"])}
    rows = []
    for name, tokens in largest.items():
        of_name = {r["routing"]: r for r in results if (r["name"], r["tokens"]) == (name, tokens)}
        rows.append([_title(of_name["uniform"]), *(_cell(of_name[r]) for r in routings)])
    return markdown(["shape", *routings], rows)


def _cell(result: dict) -> str:
    forward = result["passes"][0]
    up = forward["products"][0]
    share = forward["predicted_share_of_floor"]
    return f"{up['tile']} {up['tile_efficiency']:.0%}, {share:.0%}"
