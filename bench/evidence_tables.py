# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/evidence.md, from the content of bench/results/evidence.json.

A claim is held against a difference taken seed by seed: its mean, and the 95 % interval of
Student's t. Verdicts follow from the interval alone.
"""

from statistics import fmean, stdev

from unipool.report.tables import markdown, with_spread

# Quantile 0.975 of Student's t by degrees of freedom.
QUANTILES = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571},
    **{6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
}


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % interval of the mean of two to ten independent values."""
    middle, half = fmean(values), QUANTILES[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def verdict(values: list[float], shows: str, opposite: str) -> str:
    """Which of the two a difference says, if it is below (`shows`) or above zero for certain."""
    _, low, high = interval(values)
    if high < 0:
        return shows
    return opposite if low > 0 else "not resolved"


def _with_interval(values: list[float]) -> str:
    middle, low, high = interval(values)
    return f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]"


def _lower(values: list[float]) -> str:
    return f"{sum(value < 0 for value in values)} of {len(values)}"


def _losses(sweep: dict) -> dict[str, dict[int, float]]:
    """Validation loss by model and seed."""
    return {
        entry["name"]: {r["seed"]: r["val_loss"] for r in entry["runs"] if "val_loss" in r}
        for entry in sweep["variants"]
    }


def _find(sweep: dict, **wanted: object) -> str:
    """Name of the one model with these properties."""
    (entry,) = (
        e for e in sweep["variants"] if all(e[name] == value for name, value in wanted.items())
    )
    return entry["name"]


def _difference(losses: dict, one: str, other: str) -> list[float]:
    """Loss of `one` less that of `other`, seed by seed."""
    return [losses[one][seed] - losses[other][seed] for seed in losses[one]]


def evidence(content: dict) -> str:
    sweep, losses = content["sweep"], _losses(content["sweep"])
    sections = [_setting(content), _models(sweep, losses), _claims(sweep, losses)]
    sections += [_probe(content["probe"]), _routing(content["probe"])]
    return "\n".join(sections)


def _setting(content: dict) -> str:
    sweep = content["sweep"]
    o, env = sweep["options"], content["environment"]
    tokens = o["steps"] * o["batch_size"] * o["seq_len"] / 1e6
    runs = sum(len(entry["runs"]) for entry in sweep["variants"])
    return (
        f"`{content['command']}`,\nthen the probes: `python bench/evidence.py` does both. {runs} "
        f"runs on two cores of an {env['processor']}, torch {env['torch']}: scale "
        f"`{sweep['scale']}`,\n"
        f"{o['steps']:,} steps of {o['batch_size']} sequences of {o['seq_len']} bytes "
        f"({tokens:.2f} M tokens) of the source of Python's standard library, learning rate "
        f"{o['lr']:g} to {o['min_lr']:g},\ninitial standard deviation {o['init_std']:g}, seeds "
        f"{', '.join(map(str, sweep['seeds']))} (weights, held-out files, order). The validation "
        f"loss is over {o['eval_tokens']:,} held-out tokens.\n"
    )


def _models(sweep: dict, losses: dict) -> str:
    rows = []
    for entry in sweep["variants"]:
        own = list(losses[entry["name"]].values())
        against = _difference(losses, entry["name"], entry["baseline"])
        baseline = entry["name"] == entry["baseline"]
        rows.append(
            [
                f"`{entry['label']}`",
                f"{entry['pools']} × {entry['pool_size']}",
                f"{entry['params_expert'] / 1e6:.2f}M",
                f"{entry['params_active'] / 1e6:.2f}M",
                with_spread(fmean(own), stdev(own), ".4f"),
                "" if baseline else _with_interval(against),
                "" if baseline else _lower(against),
                "" if baseline else verdict(against, "lower", "higher"),
            ]
        )
    head = ["model", "pools × experts", "in experts", "active", "validation loss (nats)"]
    return (
        "Mean ± standard deviation over seeds; differences seed by seed, with the 95 % interval "
        "of their mean.\n\n" + markdown([*head, "difference to `vanilla`", "seeds lower", ""], rows)
    )


def _claims(sweep: dict, losses: dict) -> str:
    layers = max(entry["pools"] for entry in sweep["variants"])
    full = max(entry["pool_size"] for entry in sweep["variants"])
    shared = {"pools": 1, "pool_size": full}
    private = _find(sweep, router="softmax", pools=layers)
    unipool = _find(sweep, router="norm", balance="pool", **shared)
    half = _find(sweep, router="norm", balance="pool", pools=1, pool_size=full // 2)
    norm_only = _find(sweep, router="norm", balance="layer", **shared)
    loss_only = _find(sweep, router="softmax", balance="pool", **shared)
    claims = [
        (
            "One pool, NormRouter and pool loss beat the layer-private model at an equal budget",
            "-0.0172 to -0.0386 at 182M to 978M active parameters, 30 B tokens",
            unipool,
            private,
            "the opposite shows",
        ),
        (
            "A pool of 41.6 % to 66.7 % of the experts matches or beats it (here: 50 %)",
            "at or below zero",
            half,
            private,
            "does not show: worse",
        ),
        (
            "The pool loss is needed: better than NormRouter with one loss per layer",
            "below zero",
            unipool,
            norm_only,
            "the opposite shows",
        ),
        (
            "NormRouter is needed: better than softmax with the pool loss",
            "below zero",
            unipool,
            loss_only,
            "the opposite shows",
        ),
    ]
    rows = []
    for claim, paper, one, other, opposite in claims:
        against = _difference(losses, one, other)
        here = [f"`{one}` − `{other}`", _with_interval(against), _lower(against)]
        rows.append([claim, paper, *here, verdict(against, "shows", opposite)])
    head = ["claim of arXiv:2605.06665", "there (nats)", "here", "difference (nats)"]
    head += ["seeds lower", ""]
    return "**Claims about loss**\n\n" + markdown(head, rows)


def _probe(probe: dict) -> str:
    """Random routing in one layer at a time; the private model against the shared one."""
    models = sorted({m["model"] for m in probe["models"]}, key=lambda name: "softmax" not in name)
    private, shared = models
    harm = {
        (m["model"], m["seed"], weights): [layer["loss_increase"] for layer in layers]
        for m in probe["models"]
        for weights, layers in m["probe"].items()
    }
    seeds = sorted({m["seed"] for m in probe["models"]})
    text = (
        "**The routing probe**: random experts in one layer at a time, "
        f"{probe['tokens']:,} held-out tokens, {probe['seeds']} random routings per layer "
        "and model. Loss increase in nats,\nmean over models of all seeds. *rule*: a random expert "
        "gets the weight that the router gives it, which is zero for most under a NormRouter; "
        "*kept*: it gets\nthe weight of the expert it replaces.\n\n"
    )
    rows = []
    for weights in ("rule", "kept"):
        for model in models:
            by_layer = zip(*(harm[model, seed, weights] for seed in seeds), strict=True)
            rows.append([f"`{model}`", weights, *(f"{fmean(layer):+.3f}" for layer in by_layer)])
    layers = len(rows[0]) - 2
    text += markdown(["model", "weights", *(f"layer {i}" for i in range(layers))], rows)
    for weights in ("rule", "kept"):
        less = [fmean(harm[private, s, weights]) - fmean(harm[shared, s, weights]) for s in seeds]
        judged = verdict(less, "the claim shows", "the opposite shows")
        text += (
            f"\nClaim: the probe harms more under a shared pool. Mean over layers with weights "
            f"*{weights}*, private less shared: {_with_interval(less)}: {judged}.\n"
        )
    return text


def _routing(probe: dict) -> str:
    rows = []
    for name_of_model in dict.fromkeys(m["model"] for m in probe["models"]):
        found = [m["routing"] for m in probe["models"] if m["model"] == name_of_model]
        for name, what, form in (
            ("silent", "tokens without a score above zero", "{:.0%}"),
            ("gini", "Gini coefficient of the load", "{:.2f}"),
            ("dead", "experts without a token", "{:.1f}"),
        ):
            layers = zip(*([row[name] for row in model] for model in found), strict=True)
            means = [form.format(fmean(layer)) for layer in layers]
            rows.append([f"`{name_of_model}`", what, *means])
    head = ["model", "", *(f"layer {i}" for i in range(len(rows[0]) - 2))]
    return "**Routing**, mean over seeds, by `unipool analyze`\n\n" + markdown(head, rows)
