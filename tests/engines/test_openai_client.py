"""`hfgpt serve` with OpenAI's client: answers are those of `generate`, and no request stops the server."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from server import CONTEXT, save_model, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfgpt import HfGPTConfig, HfGPTForSequenceClassification
from hfgpt.commands.verify import verify

pytestmark = pytest.mark.engine

PROMPTS = [f"Text {number}: {'abcdefg'[number % 7] * (number % 11)}" for number in range(50)]
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


class Served:
    """A server, its client, and the same model here."""

    def __init__(self, url: str, path: str):
        import openai

        self.url, self.path = url, path
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def expect(self, ids: list[int], tokens: int) -> str:
        prompt = torch.tensor([ids])
        generated = self.model.generate(prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return self.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)

    def expect_completion(self, prompt: str, tokens: int) -> str:
        return self.expect(self.tokenizer(prompt)["input_ids"], tokens)

    def complete(self, prompt: str, **settings):
        return self.client.completions.create(model=self.path, prompt=prompt, **{"temperature": 0, **settings})

    def chat(self, messages, **settings):
        settings = {"temperature": 0, **settings}
        return self.client.chat.completions.create(model=self.path, messages=messages, **settings)

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """The status and the body of an answer to a raw request."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").removesuffix("/v1").split(":")
        return socket.create_connection((host, int(port)), timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("chat"), "alpaca")
    with serving("serve", path, "--port", "0") as (url, _):
        yield Served(url, path)


def test_the_model_and_the_health(served):
    assert [model.id for model in served.client.models.list().data] == [served.path]
    with urllib.request.urlopen(served.url.removesuffix("/v1") + "/health", timeout=60) as response:
        assert json.load(response) == {"status": "ok"}


def test_50_parallel_completions_are_those_of_generate(served):
    expected = [served.expect_completion(prompt, 20) for prompt in PROMPTS]
    assert len(set(expected)) > 10

    def stream(prompt):
        parts = list(served.complete(prompt, max_tokens=20, stream=True))
        assert parts[-1].choices[0].finish_reason == "length"
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda prompt: served.complete(prompt, max_tokens=20), PROMPTS))
        assert [answer.choices[0].text for answer in answers] == expected
        assert {answer.usage.completion_tokens for answer in answers} == {20}
        assert list(pool.map(stream, PROMPTS)) == expected


def test_50_parallel_chats_are_those_of_generate(served):
    ids = served.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = served.expect(ids, 20)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: served.chat(QUESTION, max_completion_tokens=20), range(50)))
    assert {answer.choices[0].message.content for answer in answers} == {expected}
    assert {answer.usage.prompt_tokens for answer in answers} == {len(ids)}
    parts = list(served.chat(QUESTION, max_tokens=20, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected


@pytest.mark.parametrize("limit", [{}, {"max_tokens": 100_000}])
def test_answers_end_at_the_context(limit, served):
    prompt = "a" * (CONTEXT - 30)
    answer = served.complete(prompt, **limit)
    assert answer.choices[0].text == served.expect_completion(prompt, 30)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 30)
    assert served.chat(QUESTION, **limit).usage.total_tokens == CONTEXT


def test_the_seed_decides_the_sample_whatever_runs_in_parallel(served):
    def sample(seed):
        return served.complete("Text", temperature=1.0, top_p=0.9, max_tokens=20, seed=seed).choices[0].text

    with ThreadPoolExecutor(20) as pool:
        samples = list(pool.map(sample, [1, 2, 3, 4] * 10))
    assert samples == samples[:4] * 10
    assert len(set(samples)) == 4


def test_a_text_ends_before_a_stop_text(served):
    whole = served.expect_completion("Text", 60)
    stop = whole[20:22]
    answer = served.complete("Text", max_tokens=60, stop=[stop, "no such text"]).choices[0]
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_are_those_of_the_model(served):
    answer = served.complete("Text", max_tokens=5, logprobs=4).choices[0]
    ids = served.tokenizer("Text" + answer.text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = served.model(ids).logits[0, -6:-1].double().log_softmax(-1)
    assert "".join(answer.logprobs.tokens) == answer.text
    assert answer.logprobs.text_offset == [0, 1, 2, 3, 4]
    expected = scores.gather(-1, ids[0, -5:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(answer.logprobs.token_logprobs).double(), expected, atol=1e-4, rtol=0)
    assert [len(row) for row in answer.logprobs.top_logprobs] == [4] * 5
    assert [max(row.values()) for row in answer.logprobs.top_logprobs] == pytest.approx(
        scores.amax(-1).tolist(), abs=1e-4
    )


def test_verify_recognizes_the_model(served):
    assert verify(served.path, against=served.url).startswith("verified: this is the model measured on")


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/completions", {"prompt": "a" * CONTEXT}, 400, "the prompt has 320 tokens, which leaves no room"),
        ("/completions", {"prompt": "a" * CONTEXT, "stream": True}, 400, "the prompt has 320 tokens"),
        ("/completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens is -1"),
        ("/completions", {"prompt": "a", "model": "gpt2"}, 404, "this server only has the model"),
        ("/completions", {"prompt": "a", "unknown": 1}, 422, "unknown"),
        ("/completions", {"prompt": "a" * 5_000_000}, 413, "more than 4,194,304 bytes"),
        ("/completions", b"{bad", 422, "JSON decode error"),
        ("/completions", b"[1]", 422, "valid dictionary"),
        ("/completions", b"[" * 100_000, 400, "error parsing the body"),
        ("/completions", b"", 422, "Field required"),
        ("/completions", b'{"prompt": "\\ud800"}', 400, "cannot encode"),
        ("/chat/completions", {"messages": [{"role": "user", "content": "a" * CONTEXT}]}, 400, "leaves no room"),
        ("/chat/completions", {"messages": QUESTION, "model": "me/other"}, 404, "this server only has the model"),
        ("/responses", {"input": "a"}, 404, "Not Found"),
        ("/../load_model", {"model": "gpt2"}, 404, "Not Found"),
        ("/../reset", {}, 404, "Not Found"),
    ],
)
def test_refused_requests(path, body, status, message, served, hub):
    found, answer = served.post(path, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (found, message in answer) == (status, True), answer
    assert served.complete("Text", max_tokens=3).choices[0].text == served.expect_completion("Text", 3)


def test_cut_connections_and_noise(served):
    body = json.dumps({"prompt": "Text", "max_tokens": 200, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for _ in range(20):
        with served.connect() as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            connection.recv(200)
    for sent in (head + b"Content-Length: 500\r\n\r\n{", b"\x00\x01\r\n\r\n", b"", b"GET / HTTP/9.9\r\n\r\n"):
        with served.connect() as connection:
            connection.sendall(sent)
    with served.connect() as connection:  # a body without a length, larger than the limit
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            connection.sendall(b"10000\r\n" + b"a" * 2**16 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert served.complete("Text", max_tokens=3).choices[0].text == served.expect_completion("Text", 3)


def test_a_model_without_a_chat_template_has_completions_only(tmp_path):
    path = save_model(tmp_path / "model", None)
    with serving("serve", path, "--port", "0") as (url, _):
        plain = Served(url, path)
        status, answer = plain.post("/chat/completions", json.dumps({"messages": QUESTION}).encode())
        assert (status, "no chat template" in answer) == (400, True)
        assert plain.complete("Text", max_tokens=9).choices[0].text == plain.expect_completion("Text", 9)
        assert plain.post("/completions", b'{"prompt": "", "max_tokens": 3, "temperature": 0}')[0] == 200


def test_an_adapter_is_served_on_its_base(served, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(served.path)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    served.tokenizer.save_pretrained(tmp_path / "adapter")
    with serving("serve", str(tmp_path / "adapter"), "--port", "0") as (url, _):
        with_adapter = Served(url, served.path)
        with_adapter.model, with_adapter.path = adapted, str(tmp_path / "adapter")
        answer = with_adapter.complete("Text", max_tokens=20).choices[0].text
        assert answer == with_adapter.expect_completion("Text", 20) != served.expect_completion("Text", 20)


def test_wrong_inputs_are_one_line(served, tmp_path):
    folder = tmp_path / "classifier"
    config = HfGPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=2)
    HfGPTForSequenceClassification(config).save_pretrained(folder)
    port = served.url.removesuffix("/v1").rpartition(":")[2]
    for arguments, message in (
        ([served.path, "--port", port], f"cannot listen on 127.0.0.1, port {port} (Address already in use)"),
        ([str(folder)], "is a classifier, which has no completions"),
    ):
        command = [sys.executable, "-m", "hfgpt", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        error = done.stderr.splitlines()[-1]  # after warnings of torchao, which is installed here
        assert error.startswith("hfgpt: ")
        assert message in error
        assert "Traceback" not in done.stderr
