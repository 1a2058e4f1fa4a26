"""The client against a server that works, fails, stalls and talks nonsense; the cache; the key."""

import io
import json
import logging
import re
import sqlite3
import sys
import threading
import time

import pytest

pytest.importorskip("openai")

from tests.endpoint import DROP, Raw, Stall, asked, completion, serving
from videomem_jax.llm import (
    BadReply,
    Cache,
    Client,
    Endpoint,
    LLMError,
    Request,
    read_json,
)

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def say(text, tokens=20, read=str):
    return Request([{"role": "user", "content": text}], tokens, read)


def client_of(server, cache=None, **how):
    how = {"timeout": 30.0, "retries": 0, "key_env": "TEST_KEY"} | how
    return Client(Endpoint(server.url, "m", **how), cache)


def busy(status, **body):
    """An error after which the client tries again at once."""
    return Raw(status, json.dumps(body).encode(), headers=(("retry-after-ms", "5"),))


def test_replies_come_in_order_and_are_counted():
    with (
        serving(lambda body, _: asked(body)[::-1]) as server,
        client_of(server, price_in=2e6, price_out=1e6) as client,
    ):
        got = client.ask([say("abc"), say("def"), say("abc")])
        assert got == [("cba", None), ("fed", None), ("cba", None)]
        assert len(server.calls) == 2, "equal requests are sent once"
        usage = client.usage
        assert (usage.calls, usage.cached, usage.failed) == (2, 0, 0)
        assert (usage.tokens_in, usage.tokens_out, usage.cost) == (22, 6, 50.0)
        assert "cost 50.00" in str(usage)
        assert client.ask([]) == []
    assert server.keys == [f"Bearer {KEY}"] * 2
    assert server.calls[0]["temperature"] == 0 and server.calls[0]["max_tokens"] == 20


def test_no_more_calls_at_a_time_than_allowed():
    def slow(body, _):
        time.sleep(0.05)
        return "yes"

    with serving(slow) as server, client_of(server, concurrency=3) as client:
        threads = [
            threading.Thread(target=client.ask, args=([say(f"{i} {j}") for j in range(4)],))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.calls) == 12 and server.most == 3


@pytest.mark.parametrize("trouble", [busy(500), busy(429), busy(503)], ids=["500", "429", "503"])
def test_a_passing_failure_is_tried_again(trouble):
    with (
        serving(lambda _, number: trouble if number < 2 else "yes") as server,
        client_of(server, retries=2) as client,
    ):
        assert client.ask([say("?")]) == [("yes", None)]
        assert len(server.calls) == 3


def test_a_dropped_connection_is_tried_again_after_a_pause():
    began = time.monotonic()
    with (
        serving(lambda _, number: DROP if number < 1 else "yes") as server,
        client_of(server, retries=1) as client,
    ):
        assert client.ask([say("?")]) == [("yes", None)]
    assert time.monotonic() - began > 0.3


TROUBLES = {
    "500": (busy(500, error={"message": "out of memory"}), "HTTP 500.*out of memory"),
    "401": (busy(401, error={"message": "bad key"}), "HTTP 401.*TEST_KEY, which is set"),
    "404": (busy(404, error={"message": "no such model"}), "HTTP 404.*no such model"),
    "stalls": (Stall(20), "no answer within 0.3 s"),
    "trickles": (Stall(20, trickle=True), "no answer within"),
    "drops": (DROP, "cannot reach"),
    "html": (Raw(body=b"<html>nginx</html>", kind="text/html"), "no chat completion"),
    "broken JSON": (Raw(body=b'{"choices": ['), "cannot be used"),
    "other JSON": (Raw(body=b"[1, 2]"), "cannot be used"),
    "no choices": (Raw(body=b'{"choices": []}'), "no chat completion"),
    "odd choices": (Raw(body=b'{"choices": [null]}'), "holds no text"),
    "odd usage": (
        Raw(body=b'{"choices": [{"message": {"content": 3}}], "usage": "x"}'),
        "holds no text",
    ),
    "no text": (completion(None), "holds no text"),
    "empty": (completion("  "), "is empty"),
    "cut off": (completion("The answ", finish="length"), "cut off"),
    "only thoughts": (completion("<think>hm, B? no"), "is empty"),
    "not what was asked": (completion("bananas"), "no JSON object"),
    "not UTF-8": (Raw(body=b"\xff\xfe\x00"), "cannot be used"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_goes_on_failing_is_one_sentence_and_not_kept(name, tmp_path, monkeypatch):
    trouble, sentence = TROUBLES[name]
    cache = Cache(tmp_path / "replies.sqlite")
    monkeypatch.setattr("videomem_jax.llm._BACKOFF", 0.5)
    timeout = 0.3 if isinstance(trouble, Stall) else 30.0
    began = time.monotonic()
    with serving(lambda *_: trouble) as server:
        with client_of(server, cache, timeout=timeout) as client:
            [reply] = client.ask([say("?", read=read_json)])
            assert reply.value is None
            assert client.usage.failed == 1
        assert time.monotonic() - began < 15
        # The endpoint gets well: the request is sent again.
        server.reply = lambda *_: 'Here: {"answer": "B"}.'
        with client_of(server, cache) as client:
            assert client.ask([say("?", read=read_json)]) == [({"answer": "B"}, None)]
    assert re.search(sentence, reply.error), reply.error


def test_a_reply_that_cannot_be_read_is_asked_for_again_less_coldly():
    with (
        serving(lambda _, number: "bananas" if number < 1 else '{"a": 1}') as server,
        client_of(server, retries=1) as client,
    ):
        assert client.ask([say("?", read=read_json)]) == [({"a": 1}, None)]
    assert [call["temperature"] for call in server.calls] == [0, 0.7]


def test_what_is_late_has_failed_and_the_rest_is_there(tmp_path):
    def some_stall(body, _):
        return Stall(20) if "slow" in asked(body) else "yes"

    # One reply is kept, so that no load of the machine makes it late.
    cache = Cache(tmp_path / "replies.sqlite")
    with serving(some_stall) as server, client_of(server, cache, timeout=60.0) as client:
        client.ask([say("quick")])
        began = time.monotonic()
        got = client.ask([say("slow"), say("quick")], limit=0.5)
        assert time.monotonic() - began < 15
        assert got[1] == ("yes", None) and "no answer within 0.5 s" in got[0].error
        assert client.usage.failed == 1


def test_an_endpoint_that_is_not_there():
    client = Client(Endpoint("http://127.0.0.1:9/v1", "m", retries=0))
    [reply] = client.ask([say("?")])
    client.close()
    client.close()
    assert reply.error.startswith("cannot reach http://127.0.0.1:9/v1")


def test_the_cache_outlives_the_client_and_depends_on_all_that_a_reply_does(tmp_path):
    path, seen = tmp_path / "deep" / "replies.sqlite", []

    def count(body, number):
        return f"reply {number}"

    with serving(count) as server:

        def asks(request, **how):
            endpoint = {"model": "m", "name": "here"} | how
            with Client(Endpoint(server.url, **endpoint), Cache(path)) as client:
                [reply] = client.ask([request])
                seen.append(reply.value)
                return client.usage.cached

        assert asks(say("?")) == 0
        assert asks(say("?")) == 1 and seen[1] == seen[0]
        for request, how in (
            (say("!"), {}),
            (say("?", tokens=21), {}),
            (say("?"), {"model": "other"}),
            (say("?"), {"temperature": 0.5}),
            (say("?"), {"extra": '{"top_k": 1}'}),
            (say("?"), {"name": "there"}),
        ):
            assert asks(request, **how) == 0, (request, how)
            assert asks(request, **how) == 1
        # How often and how long one tries changes nothing in a reply.
        assert asks(say("?"), retries=7, timeout=3.0, concurrency=2) == 1
        assert len(set(seen)) == 7 == len(server.calls)


def test_extra_goes_into_the_body():
    with serving(lambda *_: "yes") as server, client_of(server, extra='{"top_k": 1}') as client:
        client.ask([say("?")])
    assert server.calls[0]["top_k"] == 1


def test_a_reply_that_a_newer_reader_refuses_is_asked_for_again(tmp_path):
    def refuse(text):
        if text == "old":
            raise BadReply("old")
        return text

    cache = Cache(tmp_path / "replies.sqlite")
    with serving(lambda *_: "old") as server, client_of(server, cache) as client:
        assert client.ask([say("?")])[0].value == "old"
        server.reply = lambda *_: "new"
        assert client.ask([say("?", read=refuse)])[0].value == "new"


def test_a_broken_cache_is_one_sentence(tmp_path):
    file = tmp_path / "replies.sqlite"
    file.write_bytes(b"this is no database" * 100)
    with pytest.raises(LLMError, match=r"replies\.sqlite cannot be used as a cache.*delete"):
        Cache(file)


def test_thoughts_are_no_part_of_a_reply():
    text = '<think>{"answer": "A"}? No.</think>\n{"answer": "B"}'
    with serving(lambda *_: text) as server, client_of(server) as client:
        assert client.ask([say("?", read=read_json)])[0].value == {"answer": "B"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": {"b": 2}}\n```', {"a": {"b": 2}}),
        ('I think {so}: {"a": "}"} and {"a": 2}', {"a": "}"}),
    ],
)
def test_json_between_words(text, found):
    assert read_json(text) == found


@pytest.mark.parametrize("text", ["", "no", "{", "[1]", '{"a": ', "{" * 5000])
def test_no_json(text):
    with pytest.raises(BadReply):
        read_json(text)


# --- the key ---


def test_the_key_is_written_nowhere(tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    cache = tmp_path / "replies.sqlite"
    leaks = [
        lambda *_: f"your key is {KEY}",
        lambda *_: busy(401, error={"message": f"Incorrect API key provided: {KEY}"}),
        lambda *_: busy(500, error={"message": f"Authorization: Bearer {KEY}"}),
        lambda *_: Raw(body=f"<p>{KEY}</p>".encode(), kind="text/html"),
        lambda *_: Raw(body=f'{{"{KEY}": '.encode()),
        lambda *_: completion(f"bananas {KEY}"),
    ]
    said = []
    with serving(None) as server:
        for i, leak in enumerate(leaks):
            server.reply = leak
            with client_of(server, Cache(cache), retries=1) as client:
                said += client.ask([say(f"{i}", read=read_json if i else str)])
                said += [repr(client), repr(client.endpoint), str(client.usage), vars(client)]
    assert server.keys and set(server.keys) == {f"Bearer {KEY}"}
    assert "[key]" in said[0].value
    heard = repr([x for x in said if not isinstance(x, dict)]) + caplog.text
    heard += "".join(capsys.readouterr())
    for value in (x for x in said if isinstance(x, dict)):
        heard += repr({name: part for name, part in value.items()})
    assert KEY not in heard
    for file in tmp_path.rglob("*"):
        assert KEY.encode() not in file.read_bytes()
    assert sqlite3.connect(cache).execute("SELECT COUNT(*) FROM replies").fetchone() == (1,)


def test_a_traceback_has_no_key(monkeypatch):
    with serving(lambda *_: busy(401, error={"message": KEY})) as server, client_of(server) as c:
        [reply] = c.ask([say("?")])
        try:
            raise LLMError(reply.error)
        except LLMError:
            out = io.StringIO()
            monkeypatch.setattr(sys, "stderr", out)
            sys.excepthook(*sys.exc_info())
    assert "[key]" in out.getvalue() and KEY not in out.getvalue()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"key_env": KEY}, "must name an environment variable"),
        ({"url": f"http://me:{KEY}@host/v1"}, "no user, password or query"),
        ({"url": f"http://host/v1?key={KEY}"}, "no user, password or query"),
        ({"url": "host:8000"}, "is no URL"),
        ({"model": ""}, "name of a model"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"extra": "{"}, "JSON object"),
        ({"extra": "[]"}, "JSON object"),
    ],
)
def test_an_endpoint_that_cannot_be(how, sentence):
    with pytest.raises(LLMError, match=sentence) as caught:
        Endpoint(**({"url": "http://host/v1", "model": "m"} | how))
    assert KEY not in str(caught.value)
