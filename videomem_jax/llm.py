"""Other models behind an OpenAI-compatible endpoint (vLLM, SGLang, a hosted one).

    client = Client(Endpoint("http://localhost:8000/v1", "Qwen3-8B"), Cache("replies.sqlite"))
    [reply] = client.ask([Request(messages, max_tokens=64, read=read_json)])

`ask` may be called from several threads. At most `Endpoint.concurrency` calls are under way; each
is tried again with growing pauses (by the official client) and given up when its time is over. A
reply that cannot be read is asked for again. Good replies are kept on disk, under a hash of all
that they depend on. What failed is a `Reply` with an error, never an exception, and is never kept.

The endpoint's key is read from the environment. It goes into the requests' header and nowhere else:
where an endpoint repeats it in a reply or an error, it is blotted out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from videomem_jax.llm_cache import Cache, LLMError

__all__ = ["BadReply", "Cache", "Client", "Endpoint", "LLMError", "Reply", "Request", "Usage"]

_NO_KEY = "none"  # what servers without keys are sent, since the client insists on one
_BACKOFF = 8.0  # the longest pause that the official client makes by itself, in seconds
_SHOWN = 200  # characters of an endpoint's error that are shown
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class BadReply(ValueError):
    """A reply that does not say what was asked for; raised by `Request.read`."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model is, and how it is asked.

    Attributes:
      url: up to and including the version, such as "http://localhost:8000/v1".
      model: its name there.
      key_env: environment variable that holds the key; it may be unset where none is needed.
      concurrency: calls under way at a time, at most.
      timeout: seconds that one try may take.
      retries: further tries after a failure, and after a reply that cannot be read.
      temperature: of the first try. A reply that could not be read is asked for again at 0.7 or
        more: at 0 the model would repeat itself.
      extra: JSON object that is added to each request's body, such as
        '{"chat_template_kwargs": {"enable_thinking": false}}'.
      price_in, price_out: of a million tokens read and written, in any currency.
      name: stands for the URL in the cache's keys, for a model that moves from host to host.

    Raises:
      LLMError: on construction, for a value that cannot be.
    """

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 3
    temperature: float = 0.0
    extra: str = ""
    price_in: float = 0.0
    price_out: float = 0.0
    name: str = ""

    def __post_init__(self):
        check_key_name(self.key_env)
        parts = urllib.parse.urlsplit(self.url)
        if parts.username or parts.password or parts.query:
            raise LLMError(
                "an endpoint's URL must hold no user, password or query: put the key into the "
                f"environment variable {self.key_env}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LLMError(
                f"{self.url!r} is no URL of an endpoint: give one such as http://localhost:8000/v1"
            )
        if not self.model:
            raise LLMError(f"the endpoint {self.url} needs the name of a model")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise LLMError(
                "an endpoint needs concurrency of at least 1, retries of 0 or more and a timeout "
                "above 0 seconds"
            )
        try:
            body = json.loads(self.extra or "{}")
        except ValueError as error:
            raise LLMError(f"an endpoint's extra must be a JSON object ({error})") from None
        if not isinstance(body, dict):
            raise LLMError("an endpoint's extra must be a JSON object")

    @property
    def identity(self) -> str:
        """All of it that a reply depends on."""
        return json.dumps([self.name or self.url, self.model, self.temperature, self.extra])

    @property
    def key(self) -> str:
        """The key, from the environment."""
        return os.environ.get(self.key_env, "").strip()


def check_key_name(name: str) -> None:
    """LLMError if what should name an environment variable cannot: it may be the key itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # Not repeated in the message, nor written anywhere.
        raise LLMError("an endpoint's key_env must name an environment variable: it is no key")


class Request(NamedTuple):
    """One call.

    messages: in the OpenAI chat format.
    max_tokens: the longest reply.
    read: makes of the reply's text what the caller wants; raises BadReply.
    """

    messages: Sequence[dict[str, Any]]
    max_tokens: int
    read: Callable[[str], Any] = str


class Reply(NamedTuple):
    """What `Request.read` made of a reply; or None and one sentence on why there is none."""

    value: Any
    error: str | None = None


@dataclasses.dataclass
class Usage:
    """What was asked so far, to be shown beside a progress bar.

    Attributes:
      calls: requests sent that were answered; `cached`: answered from the cache; `failed`: not
        answered, or not in a way that could be read.
      tokens_in, tokens_out: as the endpoint counts them.
      cost: by the endpoint's prices.
    """

    calls: int = 0
    cached: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0

    def __str__(self) -> str:
        text = (
            f"{self.calls} calls, {self.cached} from the cache, {self.failed} failed; "
            f"{self.tokens_in} tokens read, {self.tokens_out} written"
        )
        return text + (f", cost {self.cost:.2f}" if self.cost else "")


class Client:
    """Asks one model. Made once, closed at the end; a context manager does that.

    Attributes:
      endpoint: the model.
      usage: counts since it was made.
    """

    def __init__(self, endpoint: Endpoint, cache: Cache | None = None):
        """Raises LLMError where the `openai` package is not installed."""
        try:
            import openai
        except ImportError:
            raise LLMError("endpoints need `openai`: pip install -r requirements-llm.txt") from None
        self.endpoint, self.usage, self._cache = endpoint, Usage(), cache
        self._open, self._closed = threading.Lock(), False
        self._running: dict[Any, asyncio.Task] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="llm")
        self._thread.start()
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._openai = openai.AsyncOpenAI(
            api_key=endpoint.key or _NO_KEY,
            base_url=endpoint.url,
            timeout=endpoint.timeout,
            max_retries=endpoint.retries,
        )

    def ask(self, requests: Sequence[Request], limit: float | None = None) -> list[Reply]:
        """Sends requests together; equal ones once.

        Args:
          requests: of any number.
          limit: seconds after which those not answered count as failed; by default each call's own
            time limit ends it.

        Returns:
          One reply a request, in their order.

        Raises:
          LLMError: the cache cannot be used.
        """
        with self._open:
            if self._closed:
                return [self._late(None) for _ in requests]
            work = asyncio.run_coroutine_threadsafe(self._ask(requests, limit), self._loop)
        try:
            return work.result()
        except BaseException:
            work.cancel()
            raise

    def close(self) -> None:
        """Ends the calls under way; they count as failed."""
        with self._open:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    async def _end(self) -> None:
        for task in self._running.values():
            task.cancel()
        here = asyncio.current_task()
        await asyncio.gather(*(asyncio.all_tasks() - {here}), return_exceptions=True)
        await self._openai.close()

    async def _ask(self, requests: Sequence[Request], limit: float | None) -> list[Reply]:
        tasks = [self._task(request) for request in requests]
        if tasks:
            _, late = await asyncio.wait(set(tasks), timeout=limit)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        return [self._late(limit) if task.cancelled() else task.result() for task in tasks]

    def _late(self, limit: float | None) -> Reply:
        self.usage.failed += 1
        return Reply(None, f"no answer within {limit:g} s" if limit else "the client was closed")

    def _task(self, request: Request) -> asyncio.Task:
        key = self._key(request)
        who = key, request.read
        if who not in self._running:
            task = self._loop.create_task(self._answer(request, key))
            self._running[who] = task
            task.add_done_callback(lambda _: self._running.pop(who, None))
        return self._running[who]

    def _key(self, request: Request) -> str:
        depends = [self.endpoint.identity, request.max_tokens, list(request.messages)]
        text = json.dumps(depends, sort_keys=True)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    @property
    def _patience(self) -> float:
        """Seconds for a request with all its tries; a server that trickles is cut off then."""
        return (self.endpoint.timeout + _BACKOFF) * (self.endpoint.retries + 1)

    async def _answer(self, request: Request, key: str) -> Reply:
        kept = self._cache.get(key) if self._cache else None
        if kept is not None:
            try:
                value = request.read(kept)
                self.usage.cached += 1
                return Reply(value)
            except BadReply:  # it was good for an older reader
                pass
        async with self._slots:
            try:
                async with asyncio.timeout(self._patience):
                    text, reply = await self._tried(request)
            except TimeoutError:
                text, reply = "", Reply(None, f"no answer within {self._patience:g} s")
        if reply.error:
            self.usage.failed += 1
            return Reply(None, self._scrubbed(reply.error))
        if self._cache:
            self._cache.put(key, text)
        return reply

    async def _tried(self, request: Request) -> tuple[str, Reply]:
        """The text of a good reply, and what was read in it."""
        import openai

        error = "no reply"
        for attempt in range(self.endpoint.retries + 1):
            try:
                text = await self._call(request, attempt)
                return text, Reply(request.read(text))
            except openai.APITimeoutError:
                error = f"no answer within {self.endpoint.timeout:g} s"
                break
            except openai.APIConnectionError as failure:
                why = failure.__cause__ or failure
                error = f"cannot reach {self.endpoint.url} ({str(why)[:_SHOWN]})"
                break
            except openai.APIStatusError as failure:
                error = self._status(failure)
                break
            except (openai.OpenAIError, ValueError) as failure:  # BadReply among them
                error = f"the reply cannot be used: {str(failure)[:_SHOWN]}"
        return "", Reply(None, error)

    async def _call(self, request: Request, attempt: int) -> str:
        e = self.endpoint
        completion = await self._openai.chat.completions.create(
            model=e.model,
            messages=request.messages,
            max_tokens=request.max_tokens,
            temperature=max(e.temperature, 0.7) if attempt else e.temperature,
            extra_body=json.loads(e.extra or "{}"),
        )
        self.usage.calls += 1
        usage = getattr(completion, "usage", None)
        read, written = (_count(usage, f"{part}_tokens") for part in ("prompt", "completion"))
        self.usage.tokens_in += read
        self.usage.tokens_out += written
        self.usage.cost += (read * e.price_in + written * e.price_out) / 1e6
        return self._scrubbed(_text(completion))

    def _status(self, failure) -> str:
        said = f"HTTP {failure.status_code}: {str(failure.message)[:_SHOWN]}"
        if failure.status_code in (401, 403):
            state = "set" if self.endpoint.key else "not set"
            said += f" (the key is read from {self.endpoint.key_env}, which is {state})"
        return said

    def _scrubbed(self, text: str) -> str:
        key = self.endpoint.key
        return text.replace(key, "[key]") if key else text


def _count(usage: Any, name: str) -> int:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else 0


def _text(completion: Any) -> str:
    """The text of a completion, without the model's thoughts."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise BadReply("it is no chat completion")
    text = getattr(getattr(choices[0], "message", None), "content", None)
    if getattr(choices[0], "finish_reason", None) == "length":
        raise BadReply("it was cut off at the most tokens allowed")
    if not isinstance(text, str):
        raise BadReply("it holds no text")
    text = _THOUGHT.sub("", text).strip()
    if not text or "<think>" in text:
        raise BadReply("it is empty")
    return text


def read_json(text: str) -> dict[str, Any]:
    """The JSON object in a reply, which may stand between other words; raises BadReply."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return found
    raise BadReply(f"there is no JSON object in {text[:60]!r}")
