"""Asking: right answers score 1, turns see what they should, nothing is read twice."""

import pytest
from support.eval_models import answering, scripted

from ltrain.eval.answers import ask, ask_one, check_lengths
from ltrain.eval.fit import encode, generator
from ltrain.eval.tasks import TASKS


def made(model, name: str, size: int = 6):
    return encode(TASKS[name].build(generator(0, name), size), model.tokens, model.tokenizer.bos_id)


@pytest.mark.parametrize("name", ["niah_multivalue", "vt", "qa_1", "kv_turns", "kv_requests"])
def test_a_model_that_knows_scores_1_with_little_loss(name):
    sample = made(scripted(lambda text: ""), name)
    model = answering(sample.sample.turns)
    answers = list(ask_one(model, TASKS[name], 0, 0, sample))
    assert [a.score for a in answers] == [1.0] * len(sample.sample.turns)
    assert max(a.reference_loss for a in answers) < 1e-3
    assert answers[0].output.strip() == ", ".join(answers[0].answers)


def test_a_model_that_does_not_know_scores_0_with_much_loss():
    model = scripted(lambda text: "no idea\nA secret")
    (answer,) = ask_one(model, TASKS["niah_single_2"], 0, 0, made(model, "niah_single_2"))
    assert answer.score == 0.0
    assert answer.reference_loss > 5


@pytest.mark.parametrize("name", ["kv_turns", "kv_requests"])
def test_later_turns_see_earlier_ones_only_in_a_session(name):
    seen = []
    model = scripted(lambda text: (seen.append(text), "")[1])
    sample = made(model, name)
    answers = list(ask_one(model, TASKS[name], 0, 0, sample))
    first, last = sample.sample.turns[0], sample.sample.turns[-1]
    prompt = [text for text in seen if text.endswith(last.question)][-1]
    history = first.question + first.reference
    assert (history in prompt) == (name == "kv_turns")
    assert prompt.startswith(sample.sample.context)
    growing = [a.prompt_tokens for a in answers]
    assert (growing[-1] > 2 * len(first.question) + growing[0]) == (name == "kv_turns")


def test_the_shared_context_is_read_once():
    model = scripted(lambda text: "")
    sample = made(model, "kv_requests", 50)
    list(ask_one(model, TASKS["kv_requests"], 0, 0, sample))
    turns = sum(map(len, sample.questions)) + sum(map(len, sample.references))
    assert model.model.num_read == len(sample.context) + turns


def test_the_generation_ends_at_a_line_break_the_end_token_or_the_budget():
    for text, expected in (("one\ntwo", "one"), ("\none\ntwo", "one"), ("", ""), ("x" * 50, "x" * 8)):

        def following(seen: str, text: str = text) -> str:
            return text[len(seen) - 1 :]

        model = scripted(following)
        assert model.generate(model.read([ord(">")]), 8) == expected


def test_chunks_do_not_change_losses_or_what_was_read():
    following = {"a": "b", "b": "c", "c": "a"}

    def next_letter(text: str) -> str:
        return following.get(text[-1:], "")

    whole, chunked = scripted(next_letter), scripted(next_letter)
    chunked.chunk_tokens = 3
    ids = list(b"abcabcaacab")
    assert chunked.losses(ids).tolist() == whole.losses(ids).tolist()
    assert len(whole.losses(ids)) == len(ids) - 1
    after = chunked.losses(ids[4:], chunked.read(ids[:4]))
    assert after.tolist() == whole.losses(ids)[3:].tolist()


def test_lengths_are_checked_and_samples_counted():
    model = scripted(lambda text: "")
    with pytest.raises(ValueError, match="too short for vt"):
        check_lengths(model.tokenizer, [TASKS["vt"]], [4096, 64], 0)
    assert len(list(ask(model, TASKS["kv_turns"], 1024, samples=2, seed=0))) == 10
