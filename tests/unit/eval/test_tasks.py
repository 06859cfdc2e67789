"""Samples: answers stand in the context as the definition says, lengths fit, seeds decide everything."""

import re
from collections import Counter

import pytest

from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import byte_tokenizer
from ltrain.eval.fit import LARGEST, encode, fit, generator
from ltrain.eval.sample import Sample, Task, Turn, score
from ltrain.eval.tasks import GROUPS, TASKS, needle_task, select
from ltrain.eval.words import distinct

LENGTH = 4096


def tokens(text: str) -> list[int]:
    return list(text.encode())


def encoded(sample):
    return encode(sample, tokens, 256)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_sample_fills_its_length_and_holds_its_answers(task):
    made = fit(task, LENGTH, 0, 0, encoded)
    assert 0.75 * LENGTH < made.num_tokens <= LENGTH
    for turn in made.sample.turns:
        assert turn.answers and len(set(turn.answers)) == len(turn.answers)
        for answer in turn.answers:
            assert answer in made.sample.context
        assert score(turn.reference, turn.answers, task.metric) == 1.0


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_seed_decides_the_sample(task):
    first, again, other = (fit(task, 2048, seed, 0, encoded).sample for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert fit(task, 2048, 3, 1, encoded).sample != first


def test_a_length_that_is_too_short_says_what_would_do():
    with pytest.raises(ConfigError, match="use at least") as raised:
        fit(TASKS["cwe"], 100, 0, 0, encoded)
    enough = int(str(raised.value.fix).split()[-1])
    assert fit(TASKS["cwe"], enough, 0, 0, encoded).num_tokens <= enough


def test_a_context_that_stops_growing_ends_the_search():
    task = Task("constant", lambda rng, size: Sample("context", (Turn("?", ("answer",)),)))
    assert fit(task, LENGTH, 0, 0, encoded).num_tokens < 100 < LARGEST


def needles(context: str) -> list[tuple[str, str]]:
    return re.findall(r"A secret (?:number|id) of ([\w-]+) is: ([\w-]+)\.", context)


def build(name: str, size: int = 40):
    return TASKS[name].build(generator(0, name), size)


@pytest.mark.parametrize(
    ("name", "keys", "values", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multikey_2", 41, 41, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_the_numbers_of_keys_values_and_queries(name, keys, values, answers):
    sample = build(name)
    found = needles(sample.context)
    assert len({k for k, _ in found}) == keys
    assert len({v for _, v in found}) == len(found) == values
    (turn,) = sample.turns
    assert len(turn.answers) == answers
    assert {v for k, v in found if k in turn.question} == set(turn.answers)


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 20), (1.0, 40)])
def test_a_needle_stands_at_its_depth(depth, place):
    sample = needle_task(depth).build(generator(0, "x"), 40)
    lines = sample.context.split("\n\n", 1)[1].strip().split("\n")
    assert [i for i, line in enumerate(lines) if line.startswith("A secret")] == [place]


def test_a_chain_of_variables_leads_to_the_asked_value():
    sample = build("vt")
    (turn,) = sample.turns
    assignments = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.context))
    value = re.search(r"hold the value (\d+)\?", turn.question)[1]

    def resolve(name: str) -> str:
        return resolve(assignments[name]) if name in assignments else name

    assert {name for name in assignments if resolve(name) == value} == set(turn.answers)
    assert len(turn.answers) == 5
    order = [sample.context.index(f"VAR {name} =") for name in turn.answers]
    assert order == sorted(order), "no variable is used before it is assigned"


def test_common_words_occur_ten_times_as_often():
    sample = build("cwe", 300)
    counts = Counter(re.findall(r"^\d+\. (\w+)$", sample.context, re.MULTILINE))
    (turn,) = sample.turns
    common = {counts[word] for word in turn.answers}
    others = {count for word, count in counts.items() if word not in turn.answers}
    assert common == {20} and others == {2}


@pytest.mark.parametrize("size", [8, 50, 500, 5000])
def test_the_asked_coded_words_are_the_most_frequent(size):
    sample = build("fwe", size)
    counts = Counter(sample.context.split("\n\n")[1].split())
    counts.pop("...", None)
    ranked = counts.most_common()
    (turn,) = sample.turns
    assert [word for word, _ in ranked[:3]] == list(turn.answers)
    assert len(ranked) == 3 or ranked[3][1] < ranked[2][1]


def test_the_second_question_needs_two_documents():
    sample = build("qa_2", 10)
    (turn,) = sample.turns
    person = re.search(r"shares a house with (.+)\?", turn.question)[1]
    other = re.search(rf"{person} shares a house with (\w+ \w+)\.", sample.context)[1]
    assert f"{other} was born in {turn.answers[0]}" in sample.context


def test_turns_of_a_shared_context_ask_for_different_values():
    sample = build("kv_turns")
    assert len({turn.answers for turn in sample.turns}) == 5
    assert sample.history and not build("kv_requests").history


def test_scores():
    assert score("a 12 and 34", ("12", "99"), "all") == 0.5
    assert score("a BAKER", ("baker", "cook"), "any") == 1.0
    assert score("", ("x",), "any") == 0.0


def test_groups_and_names_are_selected():
    chosen = select(["ruler", "needle", "vt", "lm_eval:ruler"])
    assert tuple(task.name for task in chosen.tasks) == GROUPS["ruler"]
    assert chosen.needle and not chosen.perplexity
    assert chosen.harness == ("ruler",)
    with pytest.raises(ConfigError, match="perhaps you meant needle"):
        select(["neddle"])


def test_any_tokenizer_of_the_project_gives_the_parts_back():
    tokenizer = byte_tokenizer()
    sample = build("kv_turns", 5)
    parts = encode(sample, lambda text: tokenizer.encode(text)[1:-1].tolist(), tokenizer.bos_id)
    assert tokenizer.decode(parts.context) == sample.context


def test_words_that_run_out_are_joined():
    found = distinct(generator(0, "x"), lambda rng: "ab"[int(rng.integers(2))], 6)
    assert {"a", "b"} <= set(found) and len(set(found)) == 6
    assert set(found) == {"a", "b", "a-a", "a-b", "b-a", "b-b"}


def test_a_prefix_and_a_suffix_name_one_string_and_neither_does_alone():
    sample = build("prefix_suffix_turns", 64)
    strings = sample.context.split("\n", 1)[1].split()
    assert len({len(s) for s in strings}) > 5
    for turn in sample.turns:
        head, tail = re.findall(r'"(\w+)"', turn.question)
        starts = [s for s in strings if s.startswith(head)]
        ends = [s for s in strings if s.endswith(tail)]
        assert len(starts) > 1 and len(ends) > 1
        assert set(starts) & set(ends) == set(turn.answers)


def test_every_turn_follows_a_chain_of_its_own():
    sample = build("multi_hop_requests")
    assignments = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.context))

    def resolve(name):
        return resolve(assignments[name]) if name in assignments else name

    assert len(sample.turns) == 5
    for turn in sample.turns:
        value = re.search(r"hold the value (\d+)\?", turn.question)[1]
        assert {name for name in assignments if resolve(name) == value} == set(turn.answers)


def test_numbers_are_found_by_their_rank():
    sample = build("math_find_turns", 7)
    numbers = sorted(map(int, re.findall(r"\d+", sample.context)))
    assert len(set(numbers)) == 15
    want = {"largest": 14, "smallest": 0, "second largest": 13, "second smallest": 1, "median": 7}
    for turn in sample.turns:
        name = re.search(r"what is the (.+) of the numbers", turn.question)[1]
        assert turn.answers == (str(numbers[want.pop(name)]),)
    assert not want


def test_questions_on_shared_documents_have_one_and_two_hops():
    sample = build("qa_turns", 10)
    for number, turn in enumerate(sample.turns):
        person = re.search(r"What does (.+) work as|house with (.+)\?", turn.question)
        if number % 2:
            assert f"{person[1]} was born in" in sample.context
            assert re.search(
                rf"{person[1]} was born in \w+ and works as a {turn.answers[0]}\.", sample.context
            )
        else:
            other = re.search(rf"{person[2]} shares a house with (\w+ \w+)\.", sample.context)[1]
            assert f"{other} was born in {turn.answers[0]}" in sample.context
