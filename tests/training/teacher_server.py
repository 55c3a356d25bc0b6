"""A real HTTP server that plays the teacher's part: it solves its tasks in free text, and misbehaves when told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Behaviour = Callable[[str, int], str]  # (query words, how many requests about it before) -> what to do


@dataclass
class TeacherServer:
    """behave: names one of `_ACTS`; seen: requests by query words; answered: of them, those whose answer went out whole"""

    behave: Behaviour = lambda query, number: "good"
    delay_s: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    requests: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def text_of(request: dict) -> str:
    return "".join(p.get("text", "<picture>") for p in request["messages"][1]["content"])


def query_of(request: dict) -> str:
    return re.search(r"Query: .*?([\w ]+)(?:<picture>)?\n\nCandidates", text_of(request)).group(1).strip()


def candidates_of(request: dict) -> list[str]:
    return re.findall(r"\nc\d+: ([^\n]*)", text_of(request))


def solve(request: dict, style: str = "good") -> str:
    """Free text with the sloppiness of real models. The right candidate has every word of the query."""
    wanted = query_of(request).split()
    shown = candidates_of(request)
    right = next((i for i, c in enumerate(shown) if set(wanted) <= set(c.split())), None)
    lines = [f"- **c{i}**: {'keep' if wanted[0] in c.split() else 'no ' + wanted[0]}" for i, c in enumerate(shown)]
    checks = [f"c{right}: it says {shown[right or 0]} -> **match**"]
    if right is None:
        checks = [f"c{i}: says {c}, does not match" for i, c in enumerate(shown) if wanted[0] in c.split()]
    answer = "none" if right is None else f"c{right}"
    if style == "wrong":
        answer = f"c{(right + 1) % len(shown)}"
    elif style == "invented":
        lines.append("- c99: wrong colour")
    elif style == "twice":
        checks *= 2
    elif style == "greedy":
        lines = [f"c{i}: keep" for i in range(len(shown))]
        checks = [f"c{i}: a look {'match' if i == right else 'differs'}" for i in range(len(shown))]
    elif style == "skips":
        lines = lines[:-1]
    elif style == "silent":
        return "I would look at the colours first."
    inspection = "\n".join(checks)
    elimination = "\n".join(lines)
    return (
        f"Sure!\n\n### 1. Hypothesis\nSomething with {' '.join(wanted)}.\n\n**ELIMINATION**\n{elimination}\n\n"
        f"Inspection:\n{inspection}\n\nANSWER: {answer}"
    )


def completion(text: str | None, *, finish: str = "stop", refusal: str | None = None) -> bytes:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage}).encode()


@contextmanager
def teacher_server(behave: Behaviour | None = None, delay_s: float = 0.0) -> Iterator[TeacherServer]:
    state = TeacherServer(behave or TeacherServer.behave, delay_s)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            query = query_of(request)
            with state.lock:
                number = state.seen[query]
                state.seen[query] += 1
                state.requests.append(request)
                state.times.append(time.monotonic())
                state.keys.add(self.headers.get("Authorization"))
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            time.sleep(state.delay_s)
            try:
                self.act(state.behave(query, number), request)
            finally:
                with state.lock:
                    state.at_once -= 1

        def act(self, act: str, request: dict) -> None:
            if act.isdigit():
                self.reply(int(act), b'{"error": {"message": "no"}}', {"Retry-After": "1"} if act == "429" else {})
            elif act == "cut":
                body = completion(solve(request))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif act == "malformed":
                self.reply(200, b'{"choices": [{"mess')
            elif act == "other":
                self.reply(200, b'{"detail": "no choices here"}')
            elif act == "refusal":
                self.reply(200, completion(None, refusal="I cannot help with that."))
            elif act == "long":
                self.reply(200, completion(solve(request)[:200], finish="length"))
            elif act == "slow":
                time.sleep(5.0)
                self.reply(200, completion(solve(request)))
            else:
                self.reply(200, completion(solve(request, act)))
                with state.lock:
                    state.answered[query_of(request)] += 1

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client was killed
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
