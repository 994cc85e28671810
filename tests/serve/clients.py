"""Clients of a served model, by the `openai` package that comes with vLLM.

python clients.py http://127.0.0.1:8000/v1 REQUESTS.json ANSWERS.json
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

url, requests_path, answers_path = sys.argv[1:]
requests = json.loads(Path(requests_path).read_text())
client = OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
model = client.models.list().data[0].id
EXACT = {"return_token_ids": True, "add_special_tokens": False}


def complete(prompt, tokens, **extra):
    return client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={**EXACT, **extra}).choices[0]


def greedy(prompts, tokens, clients=8):
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda prompt: complete(prompt, tokens).token_ids, prompts))


def streamed(prompt, tokens):
    chunks = client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=EXACT)
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    return {"pieces": pieces, "whole": complete(prompt, tokens).text}


def chatted(messages, rendered, tokens):
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=tokens, temperature=0)
    return {"chat": answer.choices[0].message.content, "completion": complete(rendered, tokens).text}


def speed(prompts, tokens):
    started = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        done = list(pool.map(lambda prompt: len(complete(prompt, tokens, ignore_eos=True).token_ids), prompts))
    return {"tokens": sum(done), "seconds": time.monotonic() - started}


KINDS = {"greedy": greedy, "streamed": streamed, "chatted": chatted, "speed": speed}
answers = {"model": model, "results": [KINDS[request.pop("kind")](**request) for request in requests["requests"]]}
Path(answers_path).write_text(json.dumps(answers))
