# SPDX-License-Identifier: Apache-2.0
"""Small local sets for `unipool eval`, and the scores of a model on them worked out on their own:
prompts written from the tasks' published descriptions, log-probabilities in float64, one request at
a time. Nothing here uses lm-evaluation-harness or unipool.evaluation."""

import ast
import json
import math
import random
import re

import torch

TASKS = (
    "arc_easy",
    "arc_challenge",
    "piqa",
    "hellaswag",
    "winogrande",
    "lambada_openai",
    "race",
)
_FIVE = ["river", "stone", "light", "under", "paper", "green", "seven", "glass", "night"]
_WORDS = [*_FIVE, "café", "cold", "window", "old", "Zürich"]


def make_rows(count=9, seed=0):
    """{task: rows}; choices of different lengths, in characters and in bytes."""
    draw = random.Random(seed)

    def text(low, high):
        return " ".join(draw.choices(_WORDS, k=draw.randint(low, high)))

    def distinct(count, low, high):
        found = []
        while len(found) < count:
            found += {text(low, high)}.difference(found)
        return found

    def arc(labels):
        choices = {"text": distinct(len(labels), 1, 4), "label": list(labels)}
        answer = draw.choice(labels)
        return {"question": text(2, 6) + "?", "choices": choices, "answerKey": answer, "id": "x"}

    def problem(question):
        options = distinct(4, 1, 3)
        return {"question": question, "options": options, "answer": draw.choice("ABCD")}

    rows = {task: [] for task in TASKS}
    for number in range(count):
        rows["arc_easy"].append(arc("ABCD" if number % 3 else "ABCDE"))
        rows["arc_challenge"].append(arc("1234"))
        one, two = distinct(2, 1, 6)
        rows["piqa"].append({"goal": text(2, 5), "sol1": one, "sol2": two, "label": number % 2})
        rows["hellaswag"].append(
            {
                "activity_label": text(1, 2),
                "ctx_a": f"{text(1, 3)} [title] {text(1, 2)}.",
                "ctx_b": text(0, 2),
                "endings": [f"{text(1, 4)} [step]  {text(1, 2)}" for _ in range(4)],
                "label": str(draw.randrange(4)),
            }
        )
        rows["winogrande"].append(
            {
                "sentence": f"{text(1, 3)} _ {text(1, 3)}.",
                "option1": text(1, 1),
                "option2": text(2, 2),
                "answer": draw.choice("12"),
            }
        )
        rows["lambada_openai"].append({"text": f"{text(3, 6)} {draw.choice(_FIVE)}"})
        problems = [problem("the end is  _  ."), problem(f"{text(1, 3)}?")][number % 2 :]
        problems.append(problem(f"what is {text(1, 2)}?"))
        rows["race"].append({"article": text(4, 9), "problems": repr(problems)})
    return rows


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    for task, entries in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in entries]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# --- requests: [(context, continuation)], the number of the right one, the choices' texts


def _clean(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _race_context(row):
    *earlier, last = ast.literal_eval(row["problems"])
    text = f"Article: {row['article']}\n\n"
    for problem in earlier:
        answer = problem["options"]["ABCD".index(problem["answer"])]
        if problem["question"].endswith("  _  ."):
            text += f"{problem['question'][:-5]}{answer}\n"
        else:
            text += f"Question: {problem['question']}\nAnswer: {answer}\n"
    return text + last["question"], last


def requests_of(task, row):
    if task.startswith("arc"):
        choices = row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"])
        context = f"Question: {row['question']}\nAnswer:"
    elif task == "piqa":
        choices, gold = [row["sol1"], row["sol2"]], row["label"]
        context = f"Question: {row['goal']}\nAnswer:"
    elif task == "hellaswag":
        choices, gold = [_clean(ending) for ending in row["endings"]], int(row["label"])
        start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        context = _clean(start)
    elif task == "race":
        context, last = _race_context(row)
        choices, gold = last["options"], "ABCD".index(last["answer"])
    elif task == "winogrande":
        before, after = row["sentence"].split("_", 1)
        choices, gold = [row["option1"], row["option2"]], int(row["answer"]) - 1
        return [(before + choice, " " + after.strip()) for choice in choices], gold, choices
    else:
        context, _, word = row["text"].rpartition(" ")
        return [(context, " " + word)], 0, [word]
    return [(context, " " + choice) for choice in choices], gold, choices


@torch.no_grad()
def score(model, context, continuation, max_length=1 << 20, begin=256):
    """(log-probability of the continuation's bytes in nats, whether each was the likeliest)."""
    kept = len(context.rstrip()) or len(context)
    context, continuation = context[:kept], context[kept:] + continuation
    answer = list(continuation.encode())
    ids = ((list(context.encode()) or [begin]) + answer)[-(max_length + 1) :]
    logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double()[-len(answer) :]
    logp = torch.log_softmax(logits, dim=-1)
    wanted = torch.tensor(answer)
    return logp[range(len(answer)), wanted].sum().item(), bool((logp.argmax(-1) == wanted).all())


def expected(model, task, rows, max_length=1 << 20):
    """{metric: (value, standard error)}; of perplexity, the error to first order."""
    found = {"acc": [], "acc_norm": []}
    nats = []
    for row in rows:
        requests, gold, choices = requests_of(task, row)
        scores = [score(model, *request, max_length=max_length) for request in requests]
        if task == "lambada_openai":
            found["acc"].append(float(scores[0][1]))
            nats.append(scores[0][0])
            continue
        plain = [value for value, _ in scores]
        by_length = [v / len(choice) for v, choice in zip(plain, choices, strict=True)]
        for name, values in (("acc", plain), ("acc_norm", by_length)):
            first, second = sorted(values, reverse=True)[:2]
            assert first - second > 1e-4, "too close to tell in float32: take another seed"
            found[name].append(float(max(values) == values[gold]))
    if task in ("winogrande", "lambada_openai", "race"):
        del found["acc_norm"]
    result = {name: _mean(values) for name, values in found.items()}
    if nats:
        mean, error = _mean(nats)
        result["perplexity"] = (math.exp(-mean), error and math.exp(-mean) * error)
    return result


def _mean(values):
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
