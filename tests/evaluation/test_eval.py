# SPDX-License-Identifier: Apache-2.0
"""`unipool eval` against scores worked out without it, and on models whose scores are known."""

import importlib.util
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys

import eval_sets
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from unipool import cli
from unipool.data.tokenizer import ByteTokenizer
from unipool.errors import InputError
from unipool.evaluation import tasks as task_module
from unipool.evaluation.harness import HarnessModel, quiet
from unipool.evaluation.local import LOCAL_TASKS, PAPER_TASKS, read_rows
from unipool.files import MANIFEST
from unipool.models import UniPoolConfig, UniPoolForCausalLM, preset
from unipool.models.loading import load_model


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, small_scale):
    monkeypatch.setenv("COLUMNS", "200")


def save(folder, model, tokenizer=None):
    model.eval().save_pretrained(folder)
    (tokenizer or ByteTokenizer().hugging_face()).save_pretrained(folder)
    return folder


def random_unipool(**options):
    torch.manual_seed(1)
    options = {"num_hidden_layers": 2, "num_experts": 6, "initializer_range": 0.1} | options
    options = {"vocab_size": 320, "num_experts_per_tok": 2} | options
    return UniPoolForCausalLM(preset("tiny", **options)).eval()


def train(root, *options):
    """A run of `unipool train`; its two steps leave the model next to random."""
    (root / "text.txt").write_text("the cold river under a green stone\n" * 300)
    arguments = ["train", "--out", str(root / "run"), "--data", str(root / "text.txt")]
    arguments += ["--d-model", "32", "--d-ff", "32", "--layers", "2", "--heads", "2", "--top-k"]
    arguments += ["2", "--pool-size", "4", "--init-std", "0.1", "--seq-len", "256", "--steps", "2"]
    arguments += ["--batch-size", "2", "--eval-tokens", "256", "--device", "cpu"]
    assert cli.main([*arguments, *options]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    torch.manual_seed(2)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**sizes, max_position_embeddings=512, initializer_range=0.1)
    return save(tmp_path_factory.mktemp("mixtral") / "hf", MixtralForCausalLM(config))


@pytest.fixture(scope="module")
def rows():
    return eval_sets.make_rows()


@pytest.fixture(scope="module")
def sets(tmp_path_factory, rows):
    return eval_sets.write_rows(tmp_path_factory.mktemp("sets") / "local", rows)


def evaluate(tmp_path, *arguments):
    """What `unipool eval` wrote with --json."""
    file = tmp_path / "made" / "scores.json"
    command = ["eval", *map(str, arguments), "--device", "cpu", "--json", str(file)]
    assert cli.main(command) == 0
    return json.loads(file.read_text())


def by_task(found):
    return {score["task"]: score for score in found["tasks"]}


def errors(capsys, *arguments, code=2):
    """The one line on stderr of an evaluation that must fail with `code`."""
    assert cli.main(["eval", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    return captured.err


# --- models whose scores are known


def successor_model(kind, successors, otherwise, weight=8.0):
    """Logits that depend on the last byte only: `weight` for its successor, 0 for the others."""
    sizes = {"vocab_size": 320, "hidden_size": 320, "intermediate_size": 16, "eos_token_id": 256}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"rms_norm_eps": 1e-12, "max_position_embeddings": 512}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = UniPoolForCausalLM(UniPoolConfig(**sizes, num_experts=4, num_experts_per_tok=2))
    layer = model.model.layers[0]
    experts = layer.mlp if kind == "llama" else model.model.pools[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        (experts.down_proj.weight if kind == "llama" else experts.down_proj).zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(320))  # the norm makes 1 into sqrt(320)
        model.lm_head.weight.zero_()
        for last in range(320):
            following = ord(successors.get(chr(last), otherwise))
            model.lm_head.weight[following, last] = weight / math.sqrt(320)
    return model


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


# --- scores worked out independently


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


# --- the model that the harness sees


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=("made", i, 1))
        for i, pair in enumerate(arguments)
    ]


def harness_model(model, tokenizer=None, **options):
    options = {"max_length": 256, "batch_size": 8} | options
    with quiet():
        return HarnessModel(model, tokenizer or ByteTokenizer().hugging_face(), **options)


PAIRS = [("", "abc"), ("a b", " c"), ("a b ", "c"), ("a b", " d"), ("é", "ü" * 9), ("x" * 90, " y")]


@pytest.mark.parametrize("router", ["norm", "softmax", "recurrent"])
def test_batches_and_their_padding_change_nothing(router):
    model = random_unipool(router=router, num_experts=12)
    pairs = [(context + "w" * i, continuation) for i in range(4) for context, continuation in PAIRS]
    found = {}
    for batch_size in (1, 3, 8):
        with quiet():
            subject = harness_model(model, batch_size=batch_size)
            found[batch_size] = subject.loglikelihood(requests("loglikelihood", *pairs))
    wanted = [eval_sets.score(model, *pair) for pair in pairs]
    for answers in found.values():
        assert [value for value, _ in answers] == pytest.approx([v for v, _ in wanted], abs=2e-4)
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in wanted]
    for batch_size in (3, 8):
        values = [value for value, _ in found[batch_size]]
        assert values == pytest.approx([value for value, _ in found[1]], abs=2e-5)


def test_log_probabilities_are_float32_for_a_bfloat16_model():
    model = random_unipool().bfloat16()
    with quiet():
        answers = harness_model(model, batch_size=1).loglikelihood(
            requests("loglikelihood", *PAIRS)
        )
    wanted = [eval_sets.score(model, *pair)[0] for pair in PAIRS]
    assert [value for value, _ in answers] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("max_length", [16, 256])
def test_rolling_log_likelihood_scores_every_byte_once(max_length):
    model = random_unipool()
    texts = ["a river", "the cold stone under the window, and a river of green glass"]
    with quiet():
        subject = harness_model(model, max_length=max_length, batch_size=2)
        found = subject.loglikelihood_rolling(
            requests("loglikelihood_rolling", *[(t,) for t in texts])
        )
    for text, value in zip(texts, found, strict=True):
        ids, total = [256, *text.encode()], 0.0
        # Windows of max_length; the last one is filled up with what went before.
        for start in range(1, len(ids), max_length):
            stop = min(start + max_length, len(ids))
            seen = ids[max(0, stop - 1 - max_length) if start > 1 else 0 : stop - 1]
            logits = model(input_ids=torch.tensor([seen])).logits[0].double()
            logp = torch.log_softmax(logits, -1)[-(stop - start) :]
            total += logp[range(stop - start), ids[start:stop]].sum().item()
        assert value == pytest.approx(total, abs=1e-3)
    assert subject.requests == {"made": 2}


def test_generation_is_greedy_until_a_stop_string():
    model = random_unipool()
    with torch.no_grad():
        model.lm_head.weight[300] = 100 * model.lm_head.weight[101]  # an id past the tokenizer's
    prompts = ["a river", "the", "a cold stone under"]

    def greedy(prompt, count=20):
        ids = list(prompt.encode())
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits[:257].argmax()))
        return bytes(i for i in ids[len(prompt) :] if i < 256).decode("utf-8", "replace")

    texts = [greedy(prompt) for prompt in prompts]
    stop = texts[2][5:7]
    options = {"until": [stop], "max_gen_toks": 20, "do_sample": False}
    for batch_size in (1, 3):
        with quiet():
            subject = harness_model(model, batch_size=batch_size)
            found = subject.generate_until(
                requests("generate_until", *[(prompt, dict(options)) for prompt in prompts])
            )
        assert found == [text.split(stop)[0] for text in texts]
    assert 0 < len(found[2]) < len(texts[2])
    with pytest.raises(InputError, match=r"--max-length 16: .*\(20\) must be less"):
        harness_model(model, max_length=16).generate_until(
            requests("generate_until", ("a", dict(options)))
        )


def test_the_end_token_of_training_when_the_tokenizer_names_none():
    def three_letters():
        words = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
        return PreTrainedTokenizerFast(tokenizer_object=words)

    # The one past the tokenizer's is how `unipool train` separates texts with such a tokenizer.
    for end, text in ((1, "b"), (3, "<|endoftext|>")):
        subject = harness_model(random_unipool(eos_token_id=end), three_letters())
        assert (subject.eot_token_id, subject.prefix_token_id) == (end, end)
        assert subject.tokenizer.eos_token == text
    for end in (None, 5, [1, 2]):
        model = random_unipool()
        model.config.eos_token_id = end
        said = rf"must have an end-of-text token .* got {re.escape(str(end))}$"
        with pytest.raises(InputError, match=said):
            harness_model(model, three_letters())


def test_special_tokens_only_where_training_had_them(tmp_path):
    """A tokenizer that begins each text with a token of its own; here it is byte 1."""
    tokenizer = ByteTokenizer().hugging_face()
    first = tokenizer.convert_ids_to_tokens(1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, 1)]
    )
    tokenizer.bos_token = first
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = train(tmp_path, "--tokenizer", str(tmp_path / "tokenizer"))
    folder = shutil.copytree(run / "model", tmp_path / "elsewhere")
    text = {"lambada_openai": [{"text": "cold river"}]}
    sets = eval_sets.write_rows(tmp_path / "sets", text)
    model, _ = load_model(folder)
    for checkpoint, context in ((run, "cold"), (folder, "\x01cold")):
        found = evaluate(tmp_path, checkpoint, "--data", sets, "--task", "lambada_openai")
        nats, _ = eval_sets.score(model, context, " river")
        perplexity = found["tasks"][0]["metrics"]["perplexity"]["value"]
        assert perplexity == pytest.approx(math.exp(-nats), rel=1e-4)
    for special, begin in ((False, 256), (True, 1)):
        subject = harness_model(model, load_model(folder)[1], special_tokens=special)
        assert subject.prefix_token_id == begin


# --- local files


ROWS = eval_sets.make_rows(2)


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_a_json_list_holds_the_same_rows(tmp_path, task):
    eval_sets.write_rows(tmp_path / "lines", ROWS)
    lines = read_rows(tmp_path / "lines", task)
    (tmp_path / f"{task}.json").write_text(json.dumps(ROWS[task], indent=1), encoding="utf-8-sig")
    listed = read_rows(tmp_path, task)
    assert listed.rows == lines.rows
    assert (lines.file.name, listed.file.name) == (f"{task}.jsonl", f"{task}.json")
    assert len(lines.rows) == 2
    assert "id" not in lines.rows[0], "only what the task needs"


def test_problems_of_race_as_a_list_or_as_a_string(tmp_path):
    plain = [dict(row, problems=eval(row["problems"])) for row in ROWS["race"]]
    eval_sets.write_rows(tmp_path, {"race": plain})
    listed = read_rows(tmp_path, "race").rows
    eval_sets.write_rows(tmp_path, {"race": ROWS["race"]})
    assert read_rows(tmp_path, "race").rows == listed == ROWS["race"]


CHOICES = "field 'choices' must be an object .* got "
OF_RACE = "field 'problems' must be a list of objects"
FAULTS = [
    ("arc_easy", "question", None, r"has no field 'question' \(fields: choices, answerKey, id\)"),
    ("arc_easy", "question", 3, "field 'question' must be a text, got 3"),
    ("arc_easy", "choices", ["a"], CHOICES + r'\["a"\]'),
    ("arc_easy", "choices", {"text": ["a", "b"], "label": ["A"]}, CHOICES),
    ("arc_easy", "choices", {"text": ["a"], "label": ["A"]}, CHOICES),
    ("arc_easy", "choices", {"text": ["a", "b", "c"], "label": ["A", "C"]}, CHOICES),
    ("arc_challenge", "answerKey", "Z", "field 'answerKey' must be one of 1, 2, 3, 4, got \"Z\""),
    ("piqa", "sol2", None, "has no field 'sol2'"),
    ("piqa", "label", 2, "field 'label' must be a number from 0 to 1, got 2"),
    ("piqa", "label", True, "field 'label' must be a number from 0 to 1, got true"),
    ("hellaswag", "label", "", "field 'label' must be a number from 0 to 3"),
    ("hellaswag", "endings", "end", "field 'endings' must be a list of at least 2 texts"),
    ("hellaswag", "ctx_b", None, "has no field 'ctx_b'"),
    ("winogrande", "sentence", "no gap", "field 'sentence' must be a text with a _"),
    ("winogrande", "answer", 1, 'field \'answer\' must be "1" or "2", got 1'),
    ("winogrande", "option1", None, "has no field 'option1'"),
    ("lambada_openai", "text", "one ", "field 'text' must be a text of at least 2 words"),
    ("lambada_standard", "text", None, "has no field 'text'"),
    ("race", "problems", "[1, 2]", OF_RACE),
    ("race", "problems", "import os", OF_RACE),
    ("race", "problems", [], OF_RACE),
    ("race", "problems", [{"question": "?", "options": list("abc"), "answer": "A"}], OF_RACE),
    ("race", "problems", [{"question": "?", "options": list("abcd"), "answer": "E"}], OF_RACE),
    ("race", "article", "\ud800", "is not valid Unicode"),
]


@pytest.mark.parametrize(("task", "field", "value", "message"), FAULTS)
def test_a_row_that_does_not_fit_is_named(tmp_path, task, field, value, message):
    first, second = ROWS["lambada_openai" if task == "lambada_standard" else task]
    second = {key: part for key, part in second.items() if key != field}
    if value is not None:
        second[field] = value
    file = tmp_path / f"{task}.jsonl"
    file.write_text(json.dumps(first) + "\n\n" + json.dumps(second))
    with pytest.raises(InputError, match=f"row 3 of {file} {message}") as error:
        read_rows(tmp_path, task)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa.jsonl", b"", "piqa.jsonl has no rows"),
        ("piqa.json", b"[]", "piqa.json has no rows"),
        ("piqa.json", b"{}", r"piqa.json must be a list of objects, got \{\}"),
        ("piqa.json", b"[1]", "row 1 of .*piqa.json must be a JSON object, got 1"),
        ("piqa.json", b"[", "piqa.json is not JSON"),
        ("piqa.jsonl", b"{\n", "row 1 of .*piqa.jsonl is not JSON"),
        ("piqa.jsonl", b"\xff", "piqa.jsonl is not UTF-8 text"),
        ("race.jsonl", b"{}", "holds neither piqa.jsonl nor piqa.json; choose tasks with --task"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, capsys, mixtral, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert re.search(message, errors(capsys, mixtral, "--data", tmp_path, "--task", "piqa"))


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "arc"], "--task arc: with --data it must be one of arc_easy, .*, race"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-length", "513"], r"--max-length must be in \[2, 512\], got 513"),
        (["--max-length", "9"], "--max-length 9: task .* has an answer of .* tokens"),
        (["--json", "/dev/null/x.json"], "cannot write /dev/null/x.json"),
        (["--data", "/no/such"], "--data: /no/such is not a folder"),
        (["--shots", "3"], "--shots"),
    ],
)
def test_options_that_do_not_fit(capsys, mixtral, sets, arguments, message):
    assert re.search(message, errors(capsys, mixtral, "--data", sets, *arguments))


def test_checkpoints_that_cannot_be_used(tmp_path, capsys, run, sets):
    assert re.search(r"/no/such is not a folder; give a run", errors(capsys, "/no/such"))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    checkpoint = next((copy / "checkpoints").glob("step-*"))
    (checkpoint / MANIFEST).unlink()
    assert "is incomplete" in errors(capsys, checkpoint, "--data", sets)
    assert "holds neither a model nor a run with a checkpoint" in errors(capsys, copy)
    folder = save(tmp_path / "small", random_unipool(vocab_size=256))
    said = errors(capsys, folder, "--data", sets)
    assert "its tokenizer has 257 tokens, more than the model's vocab_size=256" in said
    broken = random_unipool()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    said = errors(capsys, save(tmp_path / "nan", broken), "--data", sets, "--task", "piqa")
    assert "its log-probabilities are not numbers" in said


def test_cuda_where_there_is_none(monkeypatch, capsys, mixtral, sets):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = errors(capsys, mixtral, "--data", sets, "--device", "cuda")
    assert "--device cuda: PyTorch sees no CUDA device" in said


@pytest.mark.parametrize("kind", ["UNSAFE_CODE", "MULTIMODAL"])
def test_tasks_that_run_code_or_show_pictures(monkeypatch, capsys, mixtral, sets, kind):
    monkeypatch.setattr(ConfigurableTask, kind, True, raising=False)
    said = errors(capsys, mixtral, "--data", sets, "--task", "piqa")
    assert "--task piqa: tasks that run code or show pictures are left out" in said


@pytest.mark.parametrize("before", [None, "0"])
def test_quiet_puts_everything_back(monkeypatch, capsys, before):
    if before is None:
        monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    else:
        monkeypatch.setenv("DISABLE_MULTIPROC", before)
    logger = logging.getLogger("lm_eval")
    monkeypatch.setattr(logger, "level", logging.INFO)

    @quiet()
    def fail():
        print("progress")
        assert (logger.level, os.environ["DISABLE_MULTIPROC"]) == (logging.ERROR, "1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (logger.level, os.environ.get("DISABLE_MULTIPROC")) == (logging.INFO, before)
    print("after")
    assert capsys.readouterr().out == "after\n"


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch, capsys, mixtral):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = errors(capsys, mixtral, code=1)
    assert 'needs lm-eval: pip install "unipool[eval]"' in said


# --- the harness's own tasks and data


@pytest.fixture(scope="module")
def every_task():
    """The harness's index of all its tasks, which takes seconds to make."""
    return task_module.TaskManager()


@pytest.fixture
def hub(monkeypatch, every_task):
    """Stands for the hub: {(path, name): splits}; what was asked for is listed."""
    held, asked = {}, []

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in held[path, name].items()}
        )

    made = task_module.TaskManager
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(task_module, "TaskManager", lambda **kw: made(**kw) if kw else every_task)
    return held, asked


def test_the_hub_is_asked_for_the_tasks_own_data(tmp_path, hub, sets, rows, mixtral):
    held, asked = hub
    held["allenai/ai2_arc", "ARC-Challenge"] = {
        "train": rows["arc_challenge"][:1],
        "validation": rows["arc_challenge"][:1],
        "test": rows["arc_challenge"],
    }
    held["baber/piqa", None] = {"train": rows["piqa"][:1], "validation": rows["piqa"]}
    names = ["--task", "piqa", "--task", "arc_challenge", "--task", "piqa"]
    found = evaluate(tmp_path, mixtral, *names)
    assert asked == [("baber/piqa", None), ("allenai/ai2_arc", "ARC-Challenge")]
    assert found["data"] == "hub"
    local = evaluate(tmp_path, mixtral, *names, "--data", sets)
    assert asked[2:] == []
    for ours, theirs in zip(local["tasks"], found["tasks"], strict=True):
        assert theirs["config"].pop("dataset_path") in ("baber/piqa", "allenai/ai2_arc")
        theirs["config"].pop("dataset_name", None)
        ours["config"].pop("dataset_path")
        assert ours == theirs


def test_tags_and_other_kinds_of_task(tmp_path, hub):
    """A tag of two tasks, one whose answers are written, and one of whole texts."""
    held, _ = hub
    row = {"question": "Q", "choices": {"text": list("wxyz"), "label": list("ABCD")}}
    arc = [row | {"answerKey": key} for key in "BCBB"]
    for name in ("ARC-Easy", "ARC-Challenge"):
        held["allenai/ai2_arc", name] = dict.fromkeys(("train", "validation", "test"), arc)
    pages = [{"page": "y y y"}, {"page": "yy"}]
    held["EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"] = dict.fromkeys(
        ("train", "validation", "test"), pages
    )
    model = successor_model("llama", {" ": "B", "B": ".", "y": " "}, " ")
    folder = save(tmp_path / "hf", model)
    tasks = ["--task", "ai2_arc", "--task", "arc_challenge_chat", "--task", "wikitext"]
    found = evaluate(tmp_path, folder, *tasks, "--max-length", 400)
    scores = by_task(found)
    assert list(scores) == ["arc_challenge", "arc_easy", "arc_challenge_chat", "wikitext"]
    written = scores["arc_challenge_chat"]["metrics"]["exact_match,remove_whitespace"]
    assert written["value"] == 0.75
    assert {score["requests"] for score in scores.values()} == {16, 4, 2}
    hit = -math.log1p(319 * math.exp(-8))
    nats = [
        3 * (hit - 8) + 2 * hit,
        2 * (hit - 8),
    ]  # y follows neither the start, nor a space, nor y
    bits = -sum(nats) / 7 / math.log(2)
    assert scores["wikitext"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert found["averages"]["acc"]["tasks"] == ["arc_challenge", "arc_easy"]


def test_a_task_that_the_harness_has_moved_is_found(tmp_path, monkeypatch, hub, sets, mixtral):
    moved = LOCAL_TASKS["piqa"]._replace(folder="elsewhere")
    monkeypatch.setitem(task_module.LOCAL_TASKS, "piqa", moved)
    found = evaluate(tmp_path, mixtral, "--data", sets, "--task", "piqa")
    assert found["tasks"][0]["docs"] == 9


def test_unknown_tasks_are_told_from_known_ones(capsys, hub, mixtral):
    said = errors(capsys, mixtral, "--task", "piqa", "--task", "pika")
    assert "--task pika is not a task of lm-eval" in said
    assert ", ".join(PAPER_TASKS) in said
    assert "`lm-eval ls tasks` lists all" in said


def test_offline_with_and_without_data(tmp_path, sets, mixtral):
    """In a process of its own, as the libraries read these variables when they are imported."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    code = (
        "import sys; from unipool import cli; sets = sys.argv.pop(); command = sys.argv[1:]\n"
        "print('online', cli.main(command), flush=True)\n"
        "print('local', cli.main([*command, '--data', sets]))"
    )
    command = [sys.executable, "-c", code, "eval", str(mixtral), "--task", "hellaswag", str(sets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("online 2\n")
    assert done.stdout.endswith("local 0\n")
    assert re.fullmatch(
        r"unipool: --task hellaswag: its data cannot be had from the hub \(.*\); "
        r"give a folder with hellaswag.jsonl as --data to evaluate offline\n",
        done.stderr,
    )
    assert not (tmp_path / "home").exists(), "no cache is left behind"


def test_help_lists_the_tasks(capsys):
    assert cli.main(["eval", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(PAPER_TASKS) in text
    assert set(PAPER_TASKS) <= set(LOCAL_TASKS)
