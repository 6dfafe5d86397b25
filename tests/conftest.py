"""Fixtures shared by several test files."""

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hub_server import Hub

# No test contacts the real Hub: huggingface_hub reads this when it is first imported, which is after this file.
HUB = Hub()
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1"}

# These files take longest. They start first, so that at the end no process of the tests waits for another.
LONG = ["test_processes.py", "test_publish.py", "test_prepared.py", "test_readme.py", "test_upload.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def hub():
    """The local Hub that all tests use, emptied."""
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """The command line sets handlers for the rest of its process, which here is the pytest process."""
    from hfgpt.errors import STOP_SIGNALS

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_config():
    """Builds configurations of models that run in a millisecond.

    No dropout, so that results can be compared. Weights ten times GPT-2's: with its 0.02 the attention of such a
    narrow model is almost uniform, and a wrong mask or position would hardly show.
    """

    def build(**overrides):
        from hfgpt import HfGPTConfig

        defaults = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return HfGPTConfig(**{**defaults, **overrides})

    return build


class Judge(HTTPServer):
    """A chat endpoint that replies with what `reply` returns for a prompt: a text, or a status to fail with."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.reply = [], lambda prompt: "50"
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def arguments(self):
        from hfgpt.evaluation.judge import JudgeArguments

        return JudgeArguments(base_url=f"http://127.0.0.1:{self.server_port}/v1/", model="referee", timeout=5)

    def stop(self):
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        reply = self.server.reply(body["messages"][0]["content"])
        status = reply if isinstance(reply, int) else 200
        choices = [{"message": {"role": "assistant", "content": reply}}]
        content = json.dumps({"choices": choices} if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def start_judge():
    judges = []

    def start() -> Judge:
        judges.append(Judge())
        return judges[-1]

    yield start
    for judge in judges:
        judge.stop()


@pytest.fixture
def judge(start_judge):
    return start_judge()
