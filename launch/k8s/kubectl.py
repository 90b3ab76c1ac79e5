"""kubectl, as a program: the only way to a cluster, with the user's own context and rights."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fmnist_dist.errors import (
    FencedError,
    FmnistDistError,
    IncompatibleError,
    TransientError,
    UsageError,
)
from launch.k8s.manifest import Document

_LIMIT_SECONDS = 60.0  # of one call
_DELETION_SECONDS = 120.0  # which kubectl waits for: the grace of the pods is in it
_NAMESPACE = "--namespace"
_AWAY = (
    "no configuration has been provided",
    "current-context is not set",
    "Unable to connect",
    "was refused",
    "connection refused",
    "connection reset",
    "connection lost",
    "i/o timeout",
    "handshake timeout",
    "no such host",
    "unexpected EOF",
)
# How kubectl begins the line of a server that has answered: `checkErr` of its util package.
_ANSWER = re.compile(r"Error from server(?: \((?P<reason>\w+)\))?: ")
# Reasons of k8s.io/apimachinery that pass; etcd's elections and time-outs come without one.
_PASSING = {
    "AlreadyExists",  # of an object that came while `apply` was at it
    "Conflict",
    "InternalError",
    "ServerTimeout",
    "ServiceUnavailable",
    "Timeout",
    "TooManyRequests",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubectl:
    """One namespace of the cluster of the current context.

    Every method raises `IncompatibleError` where there is no kubectl, `TransientError` where no
    cluster answers or it cannot just now, `UsageError` with the server's line where it refuses.
    """

    namespace: str

    def get(self, kind: str, name: str) -> Document | None:
        """Return an object, None where there is none of that name."""
        text = self._call("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def all(self, kind: str, *words: str, selector: str = "") -> "list[Document]":
        words += ("--selector", selector) if selector else ()
        return list(json.loads(self._call("get", kind, *words, "-o", "json"))["items"])

    def seen(self, kind: str, *words: str, selector: str = "") -> "list[Document] | None":
        """Return objects, None where the cluster has no such kind or this user may not see it."""
        try:
            return self.all(kind, *words, selector=selector)
        except UsageError:
            return None

    def check(self, documents: Sequence[Document]) -> None:
        """Let the server validate documents, and admit them, without creating anything."""
        self._send("apply", documents, "--dry-run=server")

    def create(self, document: Document) -> Document:
        """Create an object and return it. Raises `FencedError` where the name is taken."""
        created: Document = json.loads(self._send("create", [document], "-o", "json"))
        return created

    def apply(self, documents: Sequence[Document]) -> None:
        self._send("apply", documents)

    def patch(self, kind: str, name: str, changes: Document) -> None:
        self._call("patch", kind, name, "--type=merge", "--patch", json.dumps(changes))

    def delete(self, kind: str, name: str) -> None:
        """Delete an object after all that it owns; its pods are asked to stop, and awaited."""
        words = ["--cascade=foreground", "--ignore-not-found"]
        words.append(f"--timeout={_DELETION_SECONDS:.0f}s")
        limit = _DELETION_SECONDS + _LIMIT_SECONDS
        call([*self._command(), "delete", kind, name, *words], limit_seconds=limit)

    def attach(self, *words: str) -> int:
        """Let kubectl write to this terminal; return its exit code."""
        # No limit: logs are followed for as long as the reader likes.
        code: int = _started(subprocess.call, [*self._command(), *words])
        return code

    def _send(self, verb: str, documents: Sequence[Document], *words: str) -> str:
        # A List as JSON is one document for every verb; JSON is YAML.
        bundle = (
            documents[0]
            if len(documents) == 1
            else {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        )
        return self._call(verb, *words, "--filename", "-", sent=json.dumps(bundle))

    def _call(self, *words: str, sent: str | None = None) -> str:
        return call([*self._command(), *words], sent=sent)

    def _command(self) -> "list[str]":
        return ["kubectl", _NAMESPACE, self.namespace]


def call(
    command: list[str], *, sent: str | None = None, limit_seconds: float = _LIMIT_SECONDS
) -> str:
    """Run kubectl and return what it prints. Raises as `Kubectl` says."""
    try:
        done: subprocess.CompletedProcess[str] = _started(
            subprocess.run,
            command,
            input=sent,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TransientError(
            f"kubectl {_what(command)}: no answer in {error.timeout:g} s"
        ) from error
    if done.returncode == 0:
        return done.stdout
    raise _failure(command, done.stderr or done.stdout)


def _failure(command: list[str], said: str) -> FmnistDistError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = next((each for each in reversed(lines) if "rror" in each), lines[-1] if lines else "?")
    answer = _ANSWER.search(said)
    if answer is None and any(each in said for each in _AWAY):
        return TransientError(
            f"no cluster answers: {lines[-1] if lines else '?'}; kubectl has to reach one "
            "(KUBECONFIG, kubectl config use-context)"
        )
    reason = answer["reason"] if answer is not None else None
    if reason == "AlreadyExists" and "create" in command:
        return FencedError(f"kubectl {_what(command)}: {line}")
    is_passing = reason in _PASSING or (answer is not None and "etcdserver:" in said)
    if is_passing or "timed out waiting" in said:
        return TransientError(f"kubectl {_what(command)}: {line}")
    return UsageError(f"kubectl {_what(command)}: {line}")


def _started(start: Any, command: list[str], **rest: Any) -> Any:
    try:
        return start(command, **rest)
    except FileNotFoundError as error:
        raise IncompatibleError(
            "kubectl: found no such program on PATH, expected the client of Kubernetes 1.30 or "
            "newer (https://kubernetes.io/docs/tasks/tools)"
        ) from error
    except OSError as error:
        raise IncompatibleError(f"kubectl: cannot be started: {error.strerror}") from error


def _what(command: list[str]) -> str:
    words = command[3:] if command[1] == _NAMESPACE else command[1:]
    return " ".join(takewhile(lambda word: not word.startswith("-"), words))
