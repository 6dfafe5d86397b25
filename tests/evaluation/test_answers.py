"""Answers and how they are matched; a prompt alone and in a batch gives exactly the same answer."""

import pytest
import torch

from hfgpt.data.templates import set_chat_template
from hfgpt.errors import InputError
from hfgpt.evaluation.instructions import Answer, generate_answers, match_answers
from hfgpt.evaluation.metrics.answer_match import AnswerMatch, normalise_answer
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["".join(map(chr, range(32, 127)))], vocab_size=300)
    set_chat_template(tokenizer, "chat")
    return tokenizer


@pytest.fixture
def model(tiny_config, tokenizer):
    torch.manual_seed(0)
    return HfGPTForCausalLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=80)).eval()


def conversation(question, answer="yes"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_an_answer_in_a_batch_is_the_same_as_for_the_prompt_alone(model, tokenizer):
    conversations = [conversation("x" * length) for length in (9, 1, 30, 4, 17)]
    together = generate_answers(model, tokenizer, conversations, 10, batch_size=5)
    alone = [generate_answers(model, tokenizer, [each], 10, batch_size=1)[0] for each in conversations]
    assert together == alone
    assert len({answer.answer for answer in together}) > 1
    assert [answer.messages for answer in together] == [each[:-1] for each in conversations]


def test_an_answer_ends_at_end_of_text_or_at_the_context_length(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # logit 0, others positive and negative
    answer = generate_answers(model, tokenizer, [conversation("x" * 40)], 1000, batch_size=1)[0]
    assert not answer.finished
    prompt = tokenizer.apply_chat_template(answer.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert 0 < len(answer.answer) <= 80 - len(prompt), "every letter is at least one token"
    with pytest.raises(
        InputError, match=r"the prompt has 127 tokens with its template, .* context of 80: .* at most 79"
    ):
        generate_answers(model, tokenizer, [conversation("x" * 100)], 10, batch_size=1)
    model.lm_head.weight.data.zero_()  # all logits equal: the first id, end of text
    answer = generate_answers(model, tokenizer, [conversation("x")], 10, batch_size=1)[0]
    assert tokenizer.eos_token_id == 0
    assert (answer.answer, answer.finished) == ("", True)


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The cat.", "cat"), ("  A  Cat, an owl! ", "cat owl"), ("theatre", "theatre"), ("1,000", "1000"), ("", "")],
)
def test_normalised_answers(text, normal):
    assert normalise_answer(text) == normal


def test_matches_are_counted():
    pairs = [("blue", "blue"), (" blue\n", "blue"), ("The blue.", "blue"), ("red", "blue")]
    answers = [Answer([], right, said, finished=said != "red") for said, right in pairs]
    assert match_answers(answers) == {
        "eval_exact_match": 0.5,
        "eval_normalised_match": 0.75,
        "eval_answers": 4,
        "eval_unfinished_answers": 1,
    }
    computed = AnswerMatch(keep_in_memory=True).compute(predictions=["red"], references=["blue"])
    assert computed == {"exact_match": 0.0, "normalised_match": 0.0}
