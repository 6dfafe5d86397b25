"""The judge, over local HTTP: which answers it scores, how it fails, and what remains when it stops."""

import json

import pytest

from hfgpt.errors import InputError
from hfgpt.evaluation.instructions import Answer
from hfgpt.evaluation.judge import API_KEY, JudgeArguments, check_judge, judge_answers, read_score

ANSWERS = [Answer([{"role": "user", "content": f"Q{i}?"}], f"right {i}", f"said {i}", True) for i in range(4)]


def test_every_answer_is_scored_with_its_prompt_recorded(judge, tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY, "s3cret")
    judge.reply = lambda prompt: "80" if "said 0" in prompt else "40"
    scores = judge_answers(ANSWERS, judge.arguments, tmp_path / "j.jsonl")
    assert scores == {"judge_score": 50.0, "judge_scored": 4, "judge_failures": 0}
    path, body, key = judge.requests[0]
    assert (path, body["model"], body["temperature"], key) == ("/v1/chat/completions", "referee", 0, "Bearer s3cret")
    lines = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [80, 40, 40, 40]
    for number, line in enumerate(lines):
        assert all(text in line["prompt"] for text in (f"Q{number}?", f"right {number}", f"said {number}"))
    assert "s3cret" not in (tmp_path / "j.jsonl").read_text()


def test_failures_are_counted_and_retried(judge, tmp_path):
    judge.reply = lambda prompt: 500 if "said 1" in prompt else "very good" if "said 2" in prompt else "100"
    scores = judge_answers(ANSWERS, judge.arguments, tmp_path / "j.jsonl")
    assert scores == {"judge_score": 100.0, "judge_scored": 2, "judge_failures": 2}
    asked = len(judge.requests)
    judge.reply = lambda prompt: "0"
    scores = judge_answers(ANSWERS, judge.arguments, tmp_path / "j.jsonl")
    assert scores == {"judge_score": 50.0, "judge_scored": 4, "judge_failures": 0}
    assert len(judge.requests) == asked + 2, "scored answers are not sent again"


def test_without_a_score_there_is_no_mean(judge, tmp_path):
    judge.reply = lambda prompt: "no idea"
    scores = judge_answers(ANSWERS, judge.arguments, tmp_path / "j.jsonl")
    assert scores == {"judge_scored": 0, "judge_failures": 4}


def test_an_interrupted_judge_can_be_resumed(judge, start_judge, tmp_path):
    arguments, path = judge.arguments, tmp_path / "j.jsonl"
    judge_answers(ANSWERS[:2], arguments, path)
    with open(path, "a") as file:
        file.write('{"judge": "referee", "prom')  # a crash while writing
    judge.stop()
    with pytest.raises(
        InputError, match=r"the judge 'referee' at http://127.*does not answer.*2 of 4 answers have been judged"
    ):
        judge_answers(ANSWERS, arguments, path)
    again = start_judge()
    assert judge_answers(ANSWERS, again.arguments, path)["judge_scored"] == 4
    assert len(again.requests) == 2


def test_a_different_judge_starts_over(judge, tmp_path):
    judge_answers(ANSWERS, judge.arguments, tmp_path / "j.jsonl")
    other = judge.arguments
    other.model, other.max_answers = "other", 3
    judge.reply = lambda prompt: "10"
    assert judge_answers(ANSWERS, other, tmp_path / "j.jsonl")["judge_score"] == 10.0
    assert len(judge.requests) == 7


def test_the_judge_is_checked_before_anything_else(judge):
    check_judge(judge.arguments)
    judge.reply = lambda prompt: 401
    with pytest.raises(InputError, match=r"does not answer \(401 .*check the API key in HFGPT_JUDGE_API_KEY"):
        check_judge(judge.arguments)
    down = JudgeArguments(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(InputError, match=r"start it, fix or remove evaluation.judge"):
        check_judge(down)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("85", 85), (" 0\n", 0), ("100", 100), ("Score: 70", 70), ("70/100", 70), ("90.", 90)]
    + [(reply, None) for reply in ("101", "-5", "8.5", "eighty", "", "between 60 and 80", "1000", "85 because")],
)
def test_scores_are_read_strictly(reply, score):
    assert read_score(reply) == score


def test_arguments():
    with pytest.raises(InputError, match=r"evaluation.judge.base_url is 'localhost:1'; it must start with http://"):
        JudgeArguments(base_url="localhost:1", model="m")
    with pytest.raises(InputError, match=r"evaluation.judge.model is not set"):
        JudgeArguments(base_url="http://localhost:1")
