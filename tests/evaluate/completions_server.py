"""Stand-ins for vLLM's completions server: one in this process that runs a tiny model, and the source of one in a process of its own.

Both answer in the shape of vLLM 0.32: the echo's log-probabilities begin with null and end with the generated token's, a prompt that
leaves no room is refused with 400, and a number that is none becomes an error of 500, as JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class TinyServer:
    """A model behind /v1/completions, in threads of this process.  asked: the requests' bodies."""

    def __init__(self, model: Path, max_model_len: int):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_model_len, self.name = max_model_len, "tiny"
        self.asked: list[dict] = []
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> TinyServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def failure(self, seconds: float) -> None:
        """It lives."""

    def answer(self, body: dict) -> tuple[int, dict]:
        """Status and content."""
        with self._lock, torch.no_grad():
            self.asked.append(body)
            (prompt,) = body["prompt"]
            if body["model"] != self.name:
                return 404, {"error": {"message": "The model does not exist."}}
            if len(prompt) + body["max_tokens"] > self.max_model_len:
                return 400, {"error": {"message": f"This model's maximum context length is {self.max_model_len} tokens."}}
            choice = self._echo(prompt) if body.get("echo") else self._generate(prompt, body)
            return 200, {"choices": [{"index": 0, **choice}]}

    def _scores(self, ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _echo(self, prompt: list[int]) -> dict:
        scores = self._scores(prompt)
        ids = [*prompt, int(scores[-1].argmax())]
        own, top = [None], [None]
        for row, token in zip(scores, ids[1:], strict=True):
            best = int(row.argmax())
            own.append(row[token].item())
            top.append({self._word(token): row[token].item(), self._word(best): row[best].item()})
        return {"text": "", "finish_reason": "length", "logprobs": {"token_logprobs": own, "top_logprobs": top}}

    def _generate(self, prompt: list[int], body: dict) -> dict:
        found, values, reason = [], [], "length"
        while len(found) < body["max_tokens"] and reason == "length":
            row = self._scores(prompt + found)[-1]
            found.append(int(row.argmax()))
            values.append(row[found[-1]].item())
            written = self.tokenizer.decode(found, skip_special_tokens=True)
            if found[-1] == self.tokenizer.eos_token_id or any(stop in written for stop in body["stop"]):
                reason = "stop"
        return {"text": "not what is read", "finish_reason": reason, "token_ids": found, "logprobs": {"token_logprobs": values}}


def _handler(owner: TinyServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            status, content = owner.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            try:
                data = json.dumps(content, allow_nan=False)
            except ValueError as error:
                status, data = 500, json.dumps({"error": {"message": str(error)}})
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data.encode())))
                self.end_headers()
                self.wfile.write(data.encode())

        def log_message(self, *_arguments):
            pass

    return Handler


PROCESS = '''
    """Any prompt has scores that depend on its tokens alone.  After $FAKE_ENDS_AFTER requests it ends; each one is a line of $FAKE_ASKED."""
    import hashlib, http.server, json, os, sys, threading, time

    if "FAKE_NO_START" in os.environ:
        print("INFO: loading\\nValueError: the KV cache is too small for the model's longest text", flush=True)
        sys.exit(3)
    asked, lock, ends_after = [], threading.Lock(), int(os.environ.get("FAKE_ENDS_AFTER", "0"))
    name = sys.argv[sys.argv.index("--served-model-name") + 1]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == name and body["echo"]
            with lock:
                asked.append(body)
                if ends_after and len(asked) > ends_after:
                    print("RuntimeError: CUDA error: an illegal memory access was encountered", flush=True)
                    os._exit(1)
                with open(os.environ["FAKE_ASKED"], "a") as file:
                    file.write(json.dumps(body["prompt"]) + "\\n")
            time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
            values = [None]
            for token in body["prompt"][0]:
                values.append(-hashlib.sha256(str((values, token)).encode()).digest()[0] / 64 - 0.5)
            choice = {"index": 0, "logprobs": {"token_logprobs": values, "top_logprobs": [value and {"x": value} for value in values]}}
            data = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
'''
