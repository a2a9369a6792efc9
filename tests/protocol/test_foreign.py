"""Nothing but `zmq` and `msgpack` on one side: docs/protocol.md's examples are true."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio

from protocol.clients import VerifierClient
from protocol.errors import InvalidError, VersionMismatchError
from protocol.messages import (
    Body,
    DraftRequest,
    FinishReason,
    GenerationDone,
    InfoRequest,
    Sample,
    Verdict,
    VerdictStatus,
    VerifyItem,
    VerifyReply,
    VerifyRequest,
    VersionSpan,
)
from protocol.server import Call
from tests.protocol.conftest import Connect, Serve

DOCS = Path(__file__).parents[2] / "docs" / "protocol.md"
T = 10.0


def example(marker: str) -> str:
    """The Python block of docs/protocol.md that starts with the comment `# marker`."""
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        if block.startswith(f"# {marker}"):
            return block
    raise AssertionError(f"docs/protocol.md has no example {marker}")


@pytest.fixture
def foreign_verifier(tmp_path: Path) -> Iterator[str]:
    """The verifier of docs/protocol.md, in a thread."""
    names: dict[str, Any] = {}
    exec(compile(example("verifier.py"), str(DOCS), "exec"), names)
    address, stop = f"ipc://{tmp_path}/v", threading.Event()
    thread = threading.Thread(target=names["serve"], args=(address, stop.is_set))
    thread.start()
    yield address
    stop.set()
    thread.join(5.0)
    assert not thread.is_alive()


async def test_our_client_and_the_verifier_of_the_docs(foreign_verifier: str, connect: Connect) -> None:
    client = connect(foreign_verifier, VerifierClient, resend_s=0.05)
    assert isinstance(client, VerifierClient)
    items = [VerifyItem(f"i{n}", completion=str(n), reference="3") for n in range(5)]
    for _ in range(3):
        verdicts = await client.verify(items, timeout_s=T)
        assert [v.id for v in verdicts] == [item.id for item in items]
        right = [v.status is VerdictStatus.CORRECT for v in verdicts]
        assert right == [False, False, False, True, False] and verdicts[3].score == 1.0
    many = await asyncio.gather(*(client.verify(items, timeout_s=T) for _ in range(3000)))
    assert len(many) == 3000
    with pytest.raises(InvalidError):
        await client.request("draft", InfoRequest(), Body, timeout_s=T)


async def test_the_client_of_the_docs_and_our_server(serve: Serve) -> None:
    async def verify(call: Call, body: VerifyRequest) -> Body:
        for item in body.items:
            await call.reply(VerifyReply([Verdict(item.id, VerdictStatus.CORRECT, 1.0)]))
        return VerifyReply([])

    server = await serve(("verify", VerifyRequest, verify))
    names: dict[str, Any] = {}
    exec(compile(example("client.py"), str(DOCS), "exec"), names)
    items = [{"id": "a", "completion": "1", "reference": "1"}, {"id": "b", "completion": "2", "reference": "2"}]
    verdicts = await asyncio.to_thread(names["verify"], server.address, items, 5.0)
    assert [(v["id"], v["status"], v["score"]) for v in verdicts] == [("a", "correct", 1.0), ("b", "correct", 1.0)]


async def test_a_whole_exchange_with_zmq_and_msgpack_alone(serve: Serve) -> None:
    async def draft(call: Call, body: DraftRequest) -> Body:
        assert body.prompt_ids is not None
        ids = body.prompt_ids * 2
        await call.reply(Sample(0, ids, ids.astype(np.float32), [VersionSpan(1, 2, 0, 3)], FinishReason.STOP, "six"))
        return GenerationDone(body.prompt_ids, 1)

    server = await serve(("draft", DraftRequest, draft))
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(server.address)
        body = {
            "n": 1,
            "sampling": {"max_new_tokens": 3},
            "prompt_ids": {"dtype": "int32", "shape": [3], "frame": 0},
        }
        head = {"v": [1, 0], "kind": "draft", "id": "r1", "timeout_ms": 5000, "body": body}
        await socket.send_multipart([msgpack.packb(head), np.array([1, 2, 3], np.int32).tobytes()])
        first, ids, logprobs = await asyncio.wait_for(socket.recv_multipart(), T)
        reply = msgpack.unpackb(first)
        assert (reply["v"], reply["kind"], reply["id"], reply["seq"]) == ([1, 0], "reply", "r1", 0)
        assert reply["body"]["versions"] == [[1, 2, 0, 3]] and reply["body"]["finish_reason"] == "stop"
        assert reply["body"]["output_ids"] == {"dtype": "int32", "shape": [3], "frame": 0}
        assert reply["body"]["logprobs"] == {"dtype": "float32", "shape": [3], "frame": 1}
        assert np.frombuffer(ids, "<i4").tolist() == np.frombuffer(logprobs, "<f4").tolist() == [2, 4, 6]
        last, prompt = await asyncio.wait_for(socket.recv_multipart(), T)
        done = msgpack.unpackb(last)
        assert (done["kind"], done["seq"]) == ("done", 1) and np.frombuffer(prompt, "<i4").tolist() == [1, 2, 3]
        assert done["session"] == reply["session"] and done["credit"] == reply["credit"] + 1

        # A resend that has the first reply gets the second again; once acknowledged, the id is new work.
        await socket.send_multipart([msgpack.packb(head | {"ack": 1}), np.array([1, 2, 3], np.int32).tobytes()])
        assert msgpack.unpackb((await asyncio.wait_for(socket.recv_multipart(), T))[0])["seq"] == 1
        ack = {"v": [1, 0], "kind": "ack", "id": "", "body": {"acks": {"r1": 2}}}
        await socket.send_multipart([msgpack.packb(ack)])
        probe = {"v": [1, 0], "kind": "session", "id": "s", "body": {"open": {"r1": 2}}}
        await socket.send_multipart([msgpack.packb(probe)])
        answer = msgpack.unpackb((await asyncio.wait_for(socket.recv_multipart(), T))[0])
        assert answer["body"] == {"accepted": 1, "unknown": ["r1"]}


async def test_a_simple_server_that_restarts_gets_the_request_again(connect: Connect, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/v"
    client = connect(address, VerifierClient, resend_s=0.05)
    assert isinstance(client, VerifierClient)
    with zmq.asyncio.Context() as context:
        first = context.socket(zmq.ROUTER)
        first.bind(address)
        task = asyncio.create_task(client.verify([VerifyItem("a", "", "")], timeout_s=T))
        _, header = await asyncio.wait_for(first.recv_multipart(), T)
        first.close(0)
        second = context.socket(zmq.ROUTER)
        second.bind(address)
        while True:  # it may ask about the session first; a simple server need not answer
            identity, again = await asyncio.wait_for(second.recv_multipart(), T)
            if msgpack.unpackb(again)["kind"] == "verify":
                break
        assert msgpack.unpackb(again)["id"] == msgpack.unpackb(header)["id"]
        verdict = {"id": "a", "status": "correct", "score": 1.0}
        reply = {"v": [1, 3], "kind": "done", "id": msgpack.unpackb(header)["id"], "body": {"verdicts": [verdict]}}
        await second.send_multipart([identity, b"garbage"])
        await second.send_multipart([identity, msgpack.packb(reply)])
        assert (await task)[0].status is VerdictStatus.CORRECT
        second.close(0)
    assert client.malformed == 1


async def test_a_server_of_another_major_version(connect: Connect, tmp_path: Path) -> None:
    client = connect(f"ipc://{tmp_path}/v", VerifierClient)
    assert isinstance(client, VerifierClient)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(client.address)
        task = asyncio.create_task(client.verify([VerifyItem("a", "", "")], timeout_s=T))
        identity, header = await asyncio.wait_for(router.recv_multipart(), T)
        reply = {"v": [2, 0], "kind": "done", "id": msgpack.unpackb(header)["id"], "body": {}}
        await router.send_multipart([identity, msgpack.packb(reply)])
        with pytest.raises(VersionMismatchError):
            await task


async def test_replies_in_parts_and_unanswered_items(serve: Serve, connect: Connect) -> None:
    async def verify(call: Call, body: VerifyRequest) -> Body:
        await call.reply(VerifyReply([Verdict("b", VerdictStatus.WRONG, 0.0)]))
        return VerifyReply([Verdict("a", VerdictStatus.CORRECT, 1.0), Verdict("b", VerdictStatus.CORRECT, 1.0)])

    client = connect(await serve(("verify", VerifyRequest, verify)), VerifierClient)
    assert isinstance(client, VerifierClient)
    verdicts = await client.verify([VerifyItem(i, "", "") for i in "abc"], timeout_s=T)
    assert [(v.id, v.status.value, v.detail) for v in verdicts] == [
        ("a", "correct", ""), ("b", "wrong", ""), ("c", "error", "unanswered"),
    ]  # fmt: skip
