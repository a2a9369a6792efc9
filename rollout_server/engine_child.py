"""Process that hosts sglang.Engine for one rollout server: `python -m rollout_server.engine_child FD PARENT_PID`.

It talks frames (link.py) with its server, dies with it (PDEATHSIG, and EOF on the link), and takes SGLang's own
processes along. Everything SGLang needs to be told about CPU and GPU is here (STACK.md section 2).

In:  settings (first) · generate {rid, prompt, sampling} · abort {rid} · update {call, path, version, timeout_s}
Out: ready {device, context_tokens} · sample {rid, ...} · failed {rid, code, detail}
     updated {call, ok, detail, paused_s}
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from protocol.errors import ErrorCode
from protocol.process import die_with_parent
from rollout_server.link import Link

log = logging.getLogger("rollout_server.engine_child")

CPU_KV_TOKENS = 65_536
SETTINGS_DEADLINE_S = 30.0
RESERVED_TOKENS = 8
"""SGLang keeps up to 7 tokens of its context length (and KV cache) to itself and shortens completions silently."""

CPU_ARGS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,  # else the scheduler burns a core while idle
}


def prepare_device(wanted: str) -> str:
    """Decide cpu or cuda and make `import sglang` possible there. Must run before sglang is imported."""
    import torch

    device = wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device cuda: torch sees no GPU")
    if device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads are far slower on small models
        if not torch.cuda.is_available():
            stub = str(Path(__file__).parent / "cpu_stub")
            sys.path.insert(0, stub)
            os.environ["PYTHONPATH"] = os.pathsep.join([stub, os.environ.get("PYTHONPATH", "")])
        fork_from_one_import()
    return device


def fork_from_one_import() -> None:
    """Have SGLang's two helpers forked from a server process that imports SGLang once, beside this one's own import.

    SGLang insists on `spawn`, by which each helper imports it anew: 6 of 22 CPU seconds of a start. Only without a
    GPU, whose driver does not survive a fork.
    """
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["rollout_server.preload"])
    multiprocessing.forkserver.ensure_running()
    multiprocessing.set_start_method = lambda *_, **__: None  # SGLang's own call must not undo this


def engine_arguments(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Arguments of sglang.Engine: ours, then the device's, then those of the configuration."""
    args: dict[str, Any] = {
        "model_path": settings["model_path"],
        "dtype": settings["dtype"],
        "trust_remote_code": settings["trust_remote_code"],
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "max_running_requests": settings["capacity"],
        "random_seed": settings["seed"],
        "weight_version": settings["version"],
        "log_level": "warning",
    }
    if settings["context_tokens"]:
        args["context_length"] = settings["context_tokens"] + RESERVED_TOKENS
    kv_tokens = settings["max_total_tokens"]
    if device == "cpu":
        args |= CPU_ARGS
        kv_tokens = kv_tokens or max(CPU_KV_TOKENS, settings["context_tokens"] + RESERVED_TOKENS)
    if kv_tokens:
        args["max_total_tokens"] = kv_tokens
    return args | settings["engine_args"]


class Host:
    """Serves one engine on its event loop. A request is one asyncio task; cancelling it aborts it in the scheduler."""

    def __init__(self, engine: Any, link: Link) -> None:
        self._engine = engine
        self._link = link
        self._running: dict[str, asyncio.Task[None]] = {}
        self._updates: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until the server is gone, or has closed the link."""
        while (frame := await self._link.recv()) is not None:
            match frame["op"]:
                case "generate":
                    self._running[frame["rid"]] = asyncio.create_task(self._generate(frame))
                case "abort":
                    if task := self._running.get(frame["rid"]):
                        task.cancel()
                case "update":
                    task = asyncio.create_task(self._update(frame))
                    self._updates.add(task)
                    task.add_done_callback(self._updates.discard)
                case op:
                    raise ValueError(f"unknown frame {op!r}")

    async def _generate(self, frame: dict[str, Any]) -> None:
        rid = frame["rid"]
        try:
            reply = await self._sample(rid, np.frombuffer(frame["prompt"], np.int32).tolist(), frame["sampling"])
        except ValueError as error:  # SGLang's word for a request it will not take
            reply = {"op": "failed", "rid": rid, "code": ErrorCode.INVALID.value, "detail": str(error)}
        except asyncio.CancelledError:
            return
        except Exception as error:  # the boundary to SGLang: whatever it raises is this one request's failure
            log.exception("request %s", rid)
            reply = {"op": "failed", "rid": rid, "code": ErrorCode.INTERNAL.value, "detail": repr(error)}
        finally:
            del self._running[rid]
        await self._link.send(reply)

    async def _sample(self, rid: str, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        out = await self._engine.async_generate(
            input_ids=prompt, sampling_params=sampling, return_logprob=True, rid=rid
        )
        meta, ids = out["meta_info"], out["output_ids"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort":
            detail = str(reason.get("message", "aborted by the engine"))
            return {"op": "failed", "rid": rid, "code": ErrorCode.INTERNAL.value, "detail": detail}
        pairs = meta["output_token_logprobs"]
        if [pair[1] for pair in pairs] != ids:
            raise RuntimeError("log-probs belong to other tokens than were returned")
        return {
            "op": "sample",
            "rid": rid,
            "output_ids": np.array(ids, np.int32).tobytes(),
            "logprobs": np.array([pair[0] for pair in pairs], np.float32).tobytes(),
            "versions": [[span["version"], span["start"], span["end"]] for span in meta["weight_versions"]],
            "finish": reason["type"],
            "cached_tokens": meta["cached_tokens"],
        }

    async def _update(self, frame: dict[str, Any]) -> None:
        """Pause with retraction, load, flush while paused, go on: no token is sampled from a mixture, and running
        samples recompute their KV under the new weights (STACK.md, updating weights while serving)."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(frame["timeout_s"]):
                detail = await self._switch(frame["path"], frame["version"])
        except Exception as error:  # the boundary to SGLang: a failed switch is reported, and the server kills us
            log.exception("update to %s", frame["version"])
            detail = repr(error)
        reply = {"op": "updated", "call": frame["call"], "ok": not detail, "detail": detail}
        await self._link.send(reply | {"paused_s": time.monotonic() - started})

    async def _switch(self, path: str, version: str) -> str:
        from sglang.srt.managers.io_struct import (
            ContinueGenerationReqInput,
            PauseGenerationReqInput,
            UpdateWeightFromDiskReqInput,
        )

        manager = self._engine.tokenizer_manager
        await manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        request = UpdateWeightFromDiskReqInput(
            model_path=path, load_format="safetensors", weight_version=version, flush_cache=True
        )
        success, message, _ = await manager.update_weights_from_disk(request)
        if not success:
            return f"SGLang: {message}"
        await manager.continue_generation(ContinueGenerationReqInput())
        return ""


async def _receive_settings(link: Link) -> dict[str, Any]:
    settings = await asyncio.wait_for(link.recv(), SETTINGS_DEADLINE_S)
    if settings is None:
        raise SystemExit(1)
    return settings


def main() -> None:
    die_with_parent(int(sys.argv[2]))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    loop = asyncio.new_event_loop()  # SGLang binds to the loop it first runs on: one loop for life
    asyncio.set_event_loop(loop)
    link = loop.run_until_complete(Link.over(socket.socket(fileno=int(sys.argv[1]))))
    settings = loop.run_until_complete(_receive_settings(link))
    device = prepare_device(settings["device"])
    if importlib.util.find_spec("sglang") is None:
        raise SystemExit("sglang is not installed")
    import sglang

    engine = sglang.Engine(**engine_arguments(settings, device))
    kv_tokens = engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]
    context = min(engine.tokenizer_manager.context_len, kv_tokens) - RESERVED_TOKENS
    link.post({"op": "ready", "device": device, "context_tokens": context})
    try:
        loop.run_until_complete(Host(engine, link).serve())
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
