"""A judge behind an OpenAI-compatible chat endpoint, and its verdicts on disk."""

import base64
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from .questions import Marks

_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_WAIT = 60.0
_LARGEST_ANSWER = 10_000_000


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would hand the key to whoever is named there."""

    def redirect_request(self, *args, **kwargs):
        return None


@dataclass(frozen=True)
class Verdict:
    """What a judge said of a picture.

    Attributes:
        key: The item's name.
        question: The question's name.
        marks: The marks; `None` where no answer was as asked.
        answer: The last answer, as it came.
        reason: Why there are no marks.
    """

    key: str
    question: str
    marks: Marks | None
    answer: str
    reason: str | None = None


class Judge:
    """A model that looks at pictures and answers.

    Args:
        url: The endpoint: its base (`https://host/v1`) or the whole address of its chat completions.
        model: The model's name there.
        key: The key, sent as a bearer token and kept nowhere; `None` sends none.
        attempts: Answers that are asked for until one is as it should be.
        tries: Requests per answer while the endpoint is busy or out of reach.
        timeout: Seconds to wait for an answer.
        sleep: Waits between tries.

    Raises:
        ValueError: If the address is none, or holds a password.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        attempts: int = 3,
        tries: int = 6,
        timeout: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The judge's address must be http(s)://host/..., got {url!r}.")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "The judge's address must hold no name, password or query; give the key in an environment variable."
            )
        if not model:
            raise ValueError("Say which model judges.")
        if attempts < 1 or tries < 1:
            raise ValueError(f"At least one attempt and one try are needed, got {attempts} and {tries}.")
        key = (key or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError("The judge's key holds characters that no HTTP header can; it is not shown here.")
        base = url.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self.host = parts.netloc
        self.model, self.attempts, self.tries, self.timeout = model, attempts, tries, timeout
        self._key, self._sleep = key, sleep
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._has_answered = threading.Event()

    def ask(
        self, key: str, question: str, text: str, pictures: Sequence[bytes], read: Callable[[str], Marks]
    ) -> Verdict:
        """Ask until an answer is as it should be, or attempts run out.

        Args:
            key: The item's name.
            question: The question's name.
            text: What is asked.
            pictures: PNG files, in order.
            read: Turns the answer into marks, or raises `ValueError`.

        Raises:
            ValueError: If the endpoint refuses the request itself: the key, the model's name, the address.
            ConnectionError: If it stays busy or out of reach. Nothing is lost; the same command goes on later.
        """
        said, reason = "", ""
        for _ in range(self.attempts):
            try:
                said = self._say(text, pictures)
            except _Refusal as refusal:
                self._see_that_it_answers(refusal)
                return Verdict(key, question, None, said, str(refusal))
            except _Malformed as error:
                reason = str(error)
                continue
            try:
                return Verdict(key, question, read(said), said)
            except ValueError as error:
                reason = str(error)
        return Verdict(key, question, None, said, reason)

    def _see_that_it_answers(self, refusal: "_Refusal") -> None:
        """Tell a request whose content is refused from an endpoint, a model or an address that will have none."""
        if self._has_answered.is_set():
            return
        try:
            self._say("Answer with the word yes.", [png(Image.new("RGB", (64, 64), "white"))])
        except (_Refusal, _Malformed):
            raise ValueError(f"The judge refuses: {refusal}") from refusal

    def _say(self, text: str, pictures: Sequence[bytes]) -> str:
        content: list[dict] = [{"type": "text", "text": text}]
        for own in pictures:
            address = f"data:image/png;base64,{base64.b64encode(own).decode()}"
            content.append({"type": "image_url", "image_url": {"url": address}})
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        answer = self._post(json.dumps(body).encode())
        self._has_answered.set()
        try:
            said = json.loads(answer)["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as error:
            raise _Malformed("The endpoint's answer has no message.") from error
        if not isinstance(said, str):
            raise _Malformed("The answer has no text.")
        return said

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        problem = ""
        for attempt in range(self.tries):
            request = urllib.request.Request(self.url, body, headers, method="POST")
            wait = min(2.0**attempt, _LONGEST_WAIT)
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    answer = response.read(_LARGEST_ANSWER)
                if _is_completion(answer):
                    return answer
                problem = f"{self.host} answers with no chat completion: {answer[:300].decode(errors='replace')}"
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code} from {self.host}: {_beginning(error)}"
                    wait = max(wait, _asked_wait(error.headers.get("Retry-After")))
                if error.code in (400, 413, 422):
                    raise _Refusal(problem) from error
                if error.code not in _TRANSIENT:
                    raise ValueError(f"The judge refuses: {problem}") from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{self.host} cannot be reached: {error}"
            if attempt + 1 < self.tries:
                self._sleep(wait)
        raise ConnectionError(
            f"The judge did not answer in {self.tries} tries ({problem}). Run the same command again to go on."
        )


class _Malformed(Exception):
    """An answer without text."""


class _Refusal(Exception):
    """A request that the endpoint will not have."""


def _is_completion(answer: bytes) -> bool:
    """Whether an endpoint answered at all: gateways send errors and web pages with the status of success."""
    try:
        return bool(json.loads(answer)["choices"])
    except (ValueError, LookupError, TypeError):
        return False


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(300).decode(errors="replace").split())
    except OSError:
        return ""


def _asked_wait(header: str | None) -> float:
    try:
        return min(max(float(header or 0), 0.0), _LONGEST_WAIT)
    except ValueError:
        return 0.0


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


class Verdicts:
    """Verdicts in a file that only grows, one JSON object a line; each is on disk before the next is asked for.

    The first line says who judges; it comes with the first verdict, so that a judge that never answered leaves no
    trace. A line that a crash cut off is dropped when the file is opened again.

    Attributes:
        judge: Who judges: settings that all verdicts of the file have in common.

    Raises:
        ValueError: If a line that is whole is no verdict.
    """

    def __init__(self, path: Path):
        self.judge: dict | None = None
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Verdict] = {}
        if path.exists():
            self._read()
        self._is_new = self.judge is None

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        if rest:
            with open(self._path, "r+b") as file:
                file.truncate(len(content) - len(rest))
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                record = json.loads(line)
                if number == 1:
                    self.judge = dict(record["judge"])
                else:
                    verdict = Verdict(**record)
                    self._known.setdefault((verdict.key, verdict.question), verdict)
            except (ValueError, TypeError, LookupError) as error:
                raise ValueError(
                    f"{self._path}, line {number} is no verdict: {error!r}. Remove that line, or the file to judge "
                    "anew."
                ) from error

    def claim(self, judge: dict) -> None:
        """See that who judges gave the verdicts that are here.

        Raises:
            ValueError: If another did, by the settings that differ.
        """
        old = judge if self.judge is None else self.judge
        names = [own for own in dict.fromkeys([*old, *judge]) if old.get(own) != judge.get(own)]
        if names:
            differences = "; ".join(f"{own}: {old.get(own)!r} there, {judge.get(own)!r} now" for own in names)
            raise ValueError(
                f"The verdicts in {self._path} are another judge's ({differences}). Use the same judge, or remove the "
                "file to judge anew."
            )
        self.judge = judge

    def get(self, key: str, question: str) -> Verdict | None:
        """The verdict on an item, if there is one."""
        return self._known.get((key, question))

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict."""
        with self._lock:
            lines = [{"judge": self.judge}] if self._is_new else []
            # In ASCII: half a character that an answer was cut in is no text that a file could hold.
            text = "".join(json.dumps(own) + "\n" for own in [*lines, vars(verdict)])
            with open(self._path, "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            self._is_new = False
            self._known[(verdict.key, verdict.question)] = verdict
