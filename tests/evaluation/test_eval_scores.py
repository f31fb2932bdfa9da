# SPDX-License-Identifier: Apache-2.0
"""`unipool eval`: scores of models whose answers are known, and scores worked out without it."""

import math
import re

import eval_sets
import pytest
from eval_runs import by_task, evaluate, save, successor_model

from unipool.evaluation import tasks as task_module
from unipool.evaluation.harness import HarnessModel
from unipool.models.loading import load_model

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")


def known_rows():
    """After a space or a y comes y, after anything else a space. Of each task's four rows: two are
    right, one has the wrong answer for its label, one is right by characters only."""
    long = "y" * 100
    arcs = [(["nn", "yyy"], "B"), (["yyy", "nn"], "A"), (["yyy", "nn"], "B"), (["n", long], "B")]
    rows = {
        "arc_easy": [
            {"question": "Which", "choices": {"text": text, "label": ["A", "B"]}, "answerKey": key}
            for text, key in arcs
        ],
        "piqa": [
            {"goal": "To", "sol1": text[0], "sol2": text[1], "label": "AB".index(key)}
            for text, key in arcs
        ],
        "hellaswag": [
            {"activity_label": "a", "ctx_a": "b.", "ctx_b": "c", "endings": text, "label": key}
            for text, key in [(text, str("AB".index(key))) for text, key in arcs]
        ],
        # The words after the gap are the same: what counts is that a space follows the option.
        "winogrande": [
            {"sentence": "on _ it goes", "option1": one, "option2": two, "answer": answer}
            for one, two, answer in [
                ("ax", "by", "1"),
                ("by", "ax", "2"),
                ("by", "ax", "1"),
                ("cx", "cy", "1"),
            ]
        ],
        "lambada_openai": [{"text": f"some wool {w}"} for w in ("yyy", "y", "yyn", "yy")],
        "race": [
            {
                "article": "art",
                "problems": [{"question": "Q?", "options": [*text, "no", "nn"], "answer": key}],
            }
            for text, key in arcs
        ],
    }
    return rows | {"arc_challenge": rows["arc_easy"]}


@pytest.mark.parametrize("kind", ["llama", "unipool"])
def test_models_with_known_answers(tmp_path, kind):
    model = save(tmp_path / "hf", successor_model(kind, {" ": "y", "y": "y"}, " "))
    found = evaluate(tmp_path, model, "--data", eval_sets.write_rows(tmp_path / "d", known_rows()))
    scores = by_task(found)
    assert tuple(scores) == eval_sets.TASKS
    for task in ("arc_easy", "arc_challenge", "piqa", "hellaswag"):
        values = {name: metric["value"] for name, metric in scores[task]["metrics"].items()}
        assert values == {"acc": 0.5, "acc_norm": 0.75}, task
    assert scores["race"]["metrics"]["acc"]["value"] == 0.5
    assert scores["winogrande"]["metrics"]["acc"]["value"] == 0.75
    assert scores["lambada_openai"]["metrics"]["acc"]["value"] == 0.75
    hit = -math.log1p(319 * math.exp(-8))  # nats of a successor; 8 less for any other byte
    nats = [4 * hit, 2 * hit, 4 * hit - 8, 3 * hit]
    perplexity = scores["lambada_openai"]["metrics"]["perplexity"]["value"]
    assert perplexity == pytest.approx(math.exp(-sum(nats) / 4), rel=1e-5)
    averages = {name: mean["value"] for name, mean in found["averages"].items()}
    assert averages["acc"] == pytest.approx((5 * 0.5 + 2 * 0.75) / 7)
    assert averages["acc_norm"] == pytest.approx((6 * 0.75 + 0.5) / 7)


def check_scores(scores, model, rows, max_length=1 << 20):
    """Each metric of each task as eval_sets has it; whether the accuracies differ is returned."""
    for task, score in scores.items():
        wanted = eval_sets.expected(model, task, rows[task], max_length)
        assert set(score["metrics"]) == set(wanted), task
        for name, (value, stderr) in wanted.items():
            metric = score["metrics"][name]
            assert metric["value"] == pytest.approx(value, rel=1e-4), (task, name)
            if stderr is None:
                assert metric["stderr"] is None, (task, name)
            elif name == "perplexity":  # by resampling, which is not of first order
                assert 0.3 * stderr < metric["stderr"] < 3 * stderr
            else:
                assert metric["stderr"] == pytest.approx(stderr, rel=1e-6), (task, name)
    return {score["metrics"]["acc"]["value"] for score in scores.values()}


@pytest.mark.parametrize("source", ["run", "mixtral"])
def test_scores_of_all_seven_tasks(tmp_path, request, sets, rows, source, capsys):
    checkpoint = request.getfixturevalue(source)
    found = evaluate(tmp_path, checkpoint, "--data", sets)
    folder = checkpoint / "model" if source == "run" else checkpoint
    model, _ = load_model(folder)
    assert len(check_scores(by_task(found), model, rows)) > 2, "accuracies that tell tasks apart"
    assert found["checkpoint"] == str(folder)
    assert (found["model"], found["dtype"]) == (type(model).__name__, "float32")
    assert found["max_length"] == (256 if source == "run" else 512)
    table = capsys.readouterr().out
    for task, score in by_task(found).items():
        for name, metric in score["metrics"].items():
            line = next(x for x in table.splitlines() if x.split()[:2] == [task, name])
            shown = [float(x) for x in line.split()[2:] if x != "±"]
            assert shown == pytest.approx(
                [metric["value"], metric["stderr"], len(rows[task])], abs=6e-5, rel=1e-3
            )
    accuracies = [score["metrics"]["acc"] for score in by_task(found).values()]
    mean = found["averages"]["acc"]
    assert mean["tasks"] == list(eval_sets.TASKS)
    assert mean["value"] == pytest.approx(sum(a["value"] for a in accuracies) / 7)
    assert mean["stderr"] == pytest.approx(math.hypot(*(a["stderr"] for a in accuracies)) / 7)
    assert re.search(rf"average +acc +{mean['value']:.4f}", table)


def test_long_requests_lose_their_beginning(tmp_path, sets, rows, mixtral, capsys):
    found = evaluate(tmp_path, mixtral, "--data", sets, "--max-length", 48)
    model, _ = load_model(mixtral)
    scores = by_task(found)
    check_scores(scores, model, rows, max_length=48)
    table = capsys.readouterr().out
    for task, score in scores.items():
        lengths = [
            len((context + continuation).encode())
            for row in rows[task]
            for context, continuation in eval_sets.requests_of(task, row)[0]
        ]
        assert score["requests"] == len(lengths)
        assert score["cut"] == sum(length > 49 for length in lengths)
        said = f"{task}: {score['cut']} of {score['requests']} requests were longer than 48"
        assert (said in table) == (score["cut"] > 0)
    assert scores["race"]["cut"] > scores["winogrande"]["cut"]


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_limit_takes_the_first_documents(tmp_path, sets, rows, mixtral, limit):
    tasks = ("piqa", "lambada_openai")
    options = [part for task in tasks for part in ("--task", task)]
    found = evaluate(tmp_path, mixtral, "--data", sets, *options, "--limit", limit)
    scores = by_task(found)
    model, _ = load_model(mixtral)
    assert tuple(scores) == tasks
    check_scores(scores, model, {task: rows[task][:limit] for task in tasks})
    assert {score["docs"] for score in scores.values()} == {min(limit, 9)}
    assert {score["docs_available"] for score in scores.values()} == {9}
    assert found["limit"] == limit


def test_requests_come_in_batches(tmp_path, monkeypatch, sets, mixtral):
    seen = []
    call = HarnessModel._model_call

    def watched(self, ids, **options):
        seen.append(len(ids))
        return call(self, ids, **options)

    monkeypatch.setattr(HarnessModel, "_model_call", watched)
    command = (mixtral, "--data", sets, "--task", "winogrande")
    assert evaluate(tmp_path, *command)["batch_size"] == 8
    assert seen == [8, 8, 2]
    assert evaluate(tmp_path, *command, "--batch-size", 5)["batch_size"] == 5
    assert seen[3:] == [5, 5, 5, 3]


def test_json_says_how_the_numbers_came_about(tmp_path, sets, mixtral):
    found = evaluate(tmp_path, mixtral, "--data", sets, "--task", "race", "--task", "arc_easy")
    assert found["lm_eval"] == task_module.VERSION
    assert (found["data"], found["device"], found["batch_size"]) == (str(sets), "cpu", 8)
    assert found["limit"] is None
    race, arc = found["tasks"]
    assert found["special_tokens"] is True
    assert (race["version"], arc["version"]) == (3.0, 1.0)
    assert race["config"]["dataset_path"] == str(sets / "race.jsonl")
    assert arc["config"]["doc_to_text"] == "Question: {{question}}\nAnswer:"
    assert (arc["config"]["num_fewshot"], arc["config"]["output_type"]) == (0, "multiple_choice")
    mean = found["averages"]["acc"]
    assert mean["tasks"] == ["race", "arc_easy"]
    wanted = (race["metrics"]["acc"]["value"] + arc["metrics"]["acc"]["value"]) / 2
    assert mean["value"] == pytest.approx(wanted)
