"""An LLM judge for answers: any OpenAI-compatible chat endpoint, such as Ollama, vLLM or transformers serve.

Each score is saved immediately, as one JSON object per line with the full prompt and reply, so that an interrupted
evaluation can be resumed. Failures are counted and excluded from the mean.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from hfgpt.errors import InputError
from hfgpt.evaluation.instructions import Answer
from hfgpt.saving import append_text, write_text

API_KEY = "HFGPT_JUDGE_API_KEY"
PROMPT = """Here is a question, a correct answer to it, and an answer to be judged.

Question:
{question}

Correct answer:
{reference}

Answer to be judged:
{answer}

Judge how good the answer is, from 0 (useless or wrong) to 100 (as good as the correct one).
Reply with the whole number alone."""


@dataclass
class JudgeArguments:
    """The recipe's keys `evaluation.judge`.

    Args:
        base_url: URL of the endpoint, such as http://127.0.0.1:11434/v1; None: no judge. An API key, if needed, is
            read from the environment variable HFGPT_JUDGE_API_KEY.
        model: Name of the judge model at the endpoint.
        timeout: Seconds to wait for a reply.
        max_answers: Judge only the first N answers; None: all.
    """

    base_url: str | None = None
    model: str | None = None
    timeout: float = 120.0
    max_answers: int | None = None

    def __post_init__(self):
        if self.base_url is not None and not re.match(r"https?://[^/]", self.base_url):
            raise InputError(
                f"evaluation.judge.base_url is '{self.base_url}'; it must start with http:// or https://, such as "
                "http://127.0.0.1:11434/v1"
            )
        if self.base_url is not None and "@" in self.base_url:
            raise InputError(
                f"evaluation.judge.base_url contains credentials, but is written to files: use {API_KEY} instead"
            )
        if self.base_url is not None and not self.model:
            raise InputError("evaluation.judge.model is not set: name the judge model at evaluation.judge.base_url")


def check_judge(arguments: JudgeArguments):
    """Sends the judge a short request, to find out before training whether it is available.

    Raises:
        InputError: The endpoint does not reply, or its reply is not a chat completion.
    """
    try:
        _ask(arguments, "Reply with the word ready.", max_tokens=4)
    except (requests.RequestException, ValueError) as error:
        raise InputError(_unreachable(arguments, error)) from error


def judge_answers(answers: Sequence[Answer], arguments: JudgeArguments, path: Path) -> dict[str, float | int]:
    """Has the judge score answers from 0 to 100.

    Args:
        answers: The model's answers.
        arguments: The judge.
        path: The file of judgements; scores in it for the same judge and prompt are reused, failures are retried.

    Returns:
        `judge_score` (the mean score; absent if there are none), `judge_scored` and `judge_failures`.

    Raises:
        InputError: The judge cannot be reached; scores so far are saved.
    """
    chosen = answers[: arguments.max_answers]
    prompts = [
        PROMPT.format(question=answer.messages[-1]["content"], reference=answer.reference, answer=answer.answer)
        for answer in chosen
    ]
    kept = _read(path)
    scores = {line["prompt"]: line["score"] for line in kept if line["judge"] == arguments.model}
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    for prompt in prompts:
        if prompt not in scores:
            entry = {"judge": arguments.model, "prompt": prompt}
            try:
                reply = _ask(arguments, prompt, max_tokens=16)
            except requests.ConnectionError as error:
                done = f"{len(scores)} of {len(chosen)} answers have been judged in {path}"
                raise InputError(f"{_unreachable(arguments, error)}; {done}") from error
            except (requests.RequestException, ValueError) as error:
                entry |= {"score": None, "error": " ".join(str(error).split())}
            else:
                entry |= {"score": read_score(reply), "reply": reply}
            append_text(path, json.dumps(entry) + "\n")
            if entry["score"] is not None:
                scores[prompt] = entry["score"]
    given = [scores[prompt] for prompt in prompts if prompt in scores]
    result: dict[str, float | int] = {"judge_scored": len(given), "judge_failures": len(prompts) - len(given)}
    return ({"judge_score": sum(given) / len(given)} if given else {}) | result


def read_score(reply: str) -> int | None:
    """The score in a reply that is just a number from 0 to 100, optionally "/ 100"; None for any other reply."""
    found = re.fullmatch(r"\s*(?:score:?\s*)?(\d{1,3})(?:\s*/\s*100)?\s*\.?\s*", reply, re.IGNORECASE)
    return int(found[1]) if found and int(found[1]) <= 100 else None


def _ask(arguments: JudgeArguments, prompt: str, max_tokens: int) -> str:
    key = os.environ.get(API_KEY)
    response = requests.post(
        arguments.base_url.rstrip("/") + "/chat/completions",
        json={
            "model": arguments.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": max_tokens,
        },
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=arguments.timeout,
    )
    response.raise_for_status()
    try:
        reply = response.json()["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"its reply is not a chat completion: {response.text[:100]!r}") from error
    return reply or ""


def _read(path: Path) -> list[dict]:
    """The judgements in the file that have a score; an incomplete last line, left by a crash, is ignored."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    entries = [json.loads(line) for line in lines]
    return [entry for entry in entries if entry["score"] is not None]


def _unreachable(arguments: JudgeArguments, error: Exception) -> str:
    fact = " ".join(str(error).split())[:200]
    return (
        f"the judge '{arguments.model}' at {arguments.base_url} does not answer ({fact}): start it, fix or remove "
        f"evaluation.judge, or check the API key in {API_KEY}"
    )
