"""Bodies of every message, by service. Field names are the wire's field names; docs/protocol.md lists them too.

Arrays are NumPy arrays here and raw frames on the wire: token ids int32 [T], log-probs float32 [T].
Unknown fields are ignored (a newer minor version may add some); missing or wrong-typed ones are `invalid`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Id = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=1 << 22)]
Array = np.ndarray


class Body(Struct, frozen=True, kw_only=True):
    """Base of all bodies."""


# -- shared ------------------------------------------------------------------------------------------------------


class Version(Struct, frozen=True, order=True, array_like=True):
    """A policy version. `step` counts published policy updates of the trainer's `incarnation`; travels as [i, s].

    (0, 0) is what a rollout server serves before a trainer gave it weights: the model as loaded from disk.
    """

    incarnation: Count
    step: Count


UNVERSIONED = Version(0, 0)


class VersionSpan(Struct, frozen=True, array_like=True):
    """Tokens [start, end) of one sample were sampled under (incarnation, step); travels as [i, s, start, end]."""

    incarnation: Count
    step: Count
    start: Count
    end: Count

    @property
    def version(self) -> Version:
        return Version(self.incarnation, self.step)


class InfoRequest(Body, frozen=True):
    """`info` of any service. With `known`, the answer waits until it differs from that revision or `wait_ms` passed."""

    known: Count | None = None
    wait_ms: Annotated[int, Meta(ge=0, le=60_000)] = 0


class HealthRequest(Body, frozen=True):
    """`health` of any service."""


class Health(Body, frozen=True):
    """`alive`: the loop turns. `ready`: it would take work now; else `reason` says why not."""

    alive: bool
    ready: bool
    reason: str = ""


class Ack(Body, frozen=True):
    """An empty success."""


# -- rollout server ----------------------------------------------------------------------------------------------


class ChatMessage(Body, frozen=True):
    role: Annotated[str, Meta(max_length=32)]
    content: Text


class Sampling(Body, frozen=True):
    """Effective sampling parameters of one sample. Temperature in (0, 100]; 0 is greedy and cannot be trained on."""

    max_new_tokens: Positive
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: int = -1
    min_p: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0


class DraftRequest(Body, frozen=True):
    """Sample `n` completions of one prompt. Exactly one of `messages` and `prompt_ids` (int32 [T]) is given.

    `first_index`: the samples are numbered from it on, so that missing samples can be re-issued elsewhere.
    `group`: an affinity key; requests of one group should reach the replica that holds their prefix.
    """

    n: Positive
    sampling: Sampling
    messages: list[ChatMessage] | None = None
    prompt_ids: Array | None = None
    first_index: Count = 0
    group: str = ""


class RefineRequest(DraftRequest, frozen=True, kw_only=True):
    """As DraftRequest, on q' = template(prompt, draft). The draft travels as the very ids sampled (int32 [T])."""

    draft_ids: Array
    draft_truncated: bool = False


class GenerateRequest(DraftRequest, frozen=True):
    """Plain sampling for evaluation and judges: one class below drafts in priority."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Sample(Body, frozen=True):
    """One finished completion.

    output_ids: int32 [T], end-of-turn id included if it was sampled. logprobs: float32 [T], of the temperature-scaled
    distribution under each token's own version. versions: spans that cover [0, T) in order.
    """

    index: Count
    output_ids: Array
    logprobs: Array
    versions: list[VersionSpan]
    finish_reason: FinishReason
    text: Text
    cached_tokens: Count = 0


class GenerationDone(Body, frozen=True):
    """Last reply of draft, refine and generate. prompt_ids: int32 [T], exactly what the engine was given."""

    prompt_ids: Array
    samples: Count
    draft_dropped_tokens: Count = 0


class TensorSpec(Body, frozen=True):
    """One parameter in a manifest. shape: dims; dtype: torch's name ('float32', 'bfloat16'); crc32 of its bytes."""

    name: str
    dtype: str
    shape: list[Count]
    crc32: Count


class WeightsBegin(Body, frozen=True):
    """`weights.begin`: opens the transfer of `version`; an open transfer of an older version is dropped."""

    version: Version
    manifest: list[TensorSpec]
    total_bytes: Count


class WeightsChunk(Body, frozen=True):
    """`weights.chunk`: bytes [offset, offset + n) of all tensors, concatenated in manifest order (uint8 [n])."""

    version: Version
    offset: Count
    data: Array


class UpdatePolicy(StrEnum):
    """What happens to running samples when weights change (see docs/protocol.md, weights)."""

    DRAIN = "drain"
    IN_FLIGHT = "in_flight"


class WeightsCommit(Body, frozen=True):
    """`weights.commit`: verify what was staged against the manifest, then switch. Idempotent for a served version."""

    version: Version
    policy: UpdatePolicy = UpdatePolicy.IN_FLIGHT


class WeightsAbort(Body, frozen=True):
    """`weights.abort`: forget what was staged for `version`."""

    version: Version


class WeightsLoad(Body, frozen=True):
    """`weights.load`: take `version` from `path`, a folder of safetensors that this server can read."""

    version: Version
    path: str
    policy: UpdatePolicy = UpdatePolicy.IN_FLIGHT
    manifest: list[TensorSpec] | None = None


class WeightsDone(Body, frozen=True):
    """Answer of commit and load. `paused_s`: seconds for which generation stood still."""

    version: Version
    paused_s: float = 0.0


class PauseRequest(Body, frozen=True):
    """`pause` / `resume`: admission of new work stops / goes on; running samples finish."""


class RolloutInfo(Body, frozen=True):
    """`info` of a rollout server. `revision` grows with every change of version or state (see InfoRequest.known)."""

    revision: Count
    name: str
    version: Version
    state: str  # starting | ready | paused | draining | failed
    model: str
    context_tokens: Count
    capacity: Count  # samples it wants in flight at once
    running: Count
    draft_budget_tokens: Count = 0
    generated_tokens: Count = 0
    weight_updates: Count = 0


# -- verifier ----------------------------------------------------------------------------------------------------


class VerdictStatus(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"
    ERROR = "error"


class VerifyItem(Body, frozen=True):
    """One completion to grade against `reference`. `task` names the grader ('' = the server's default)."""

    id: Id
    completion: Text
    reference: Text
    task: str = ""
    metadata: dict[str, Any] = {}


class VerifyRequest(Body, frozen=True):
    items: Annotated[list[VerifyItem], Meta(min_length=1, max_length=4096)]


class Verdict(Body, frozen=True):
    """Grade of the item with the same id. score in [0, 1] is meaningful only for the first four statuses.

    seconds: time the grading took. A reference that cannot be parsed is status `error` with detail `bad_reference…`.
    """

    id: Id
    status: VerdictStatus
    score: float
    extracted: str = ""
    detail: str = ""
    seconds: float = 0.0
    parts: dict[str, float] = {}  # named partial scores (e.g. format), combined by the orchestrator's reward weights


class VerifyReply(Body, frozen=True):
    """Verdicts, in any number of replies; the last reply may be empty. Each item is answered exactly once."""

    verdicts: list[Verdict]


class VerifierInfo(Body, frozen=True):
    revision: Count
    name: str
    tasks: list[str]
    workers: Count
    queued: Count
    max_items: Count
    statuses: dict[str, int] = {}


# -- trainer -----------------------------------------------------------------------------------------------------


class TrainSample(Body, frozen=True):
    """One refinement to train on; arrays as in Sample. reward: after shaping. weight 1 takes part in the group."""

    index: Count
    output_ids: Array
    logprobs: Array
    versions: list[VersionSpan]
    reward: float
    truncated: bool = False


class TrainGroup(Body, frozen=True):
    """All graded refinements of one q'. Key: (epoch, index, attempt). prompt_ids int32 [T]: q' as the engine saw it."""

    epoch: Count
    index: Count
    attempt: Count
    prompt_ids: Array
    samples: Annotated[list[TrainSample], Meta(min_length=1)]
    temperature: float


class PushRequest(Body, frozen=True):
    """`push`: the whole batch for the update that is taken at version (incarnation, step).

    Refused if another batch was accepted for that step; `stale` if any group's lag exceeds max_staleness. Replies: one
    PushReceived when it is queued, then StepDone when it has been trained and version step + 1 exists.
    """

    incarnation: Count
    step: Count
    groups: Annotated[list[TrainGroup], Meta(min_length=1)]


class PushReceived(Body, frozen=True):
    step: Count


class StepDone(Body, frozen=True):
    """The update at `step` is done; the policy is now `version`. metrics: scalars by name (docs/metrics.md)."""

    version: Version
    metrics: dict[str, float]


class TrainerHello(Body, frozen=True):
    """`hello` of the trainer: the orchestrator asks where things stand. `term` fences older orchestrators."""

    run: str
    term: Count


class TrainerState(Body, frozen=True):
    """Answer of `hello` and `info` of the trainer. `ledger`: (epoch, index) pairs trained so far in this lineage.

    `next_step`: the step whose batch it wants next. `published`: newest version handed to the publisher.
    """

    revision: Count
    version: Version
    next_step: Count
    total_steps: Count
    max_staleness: Count
    state: str  # starting | waiting | training | finished | failed
    ledger: list[tuple[int, int]] = []
    published: Version = UNVERSIONED


class FinishRequest(Body, frozen=True):
    """`finish`: no more batches will come; export the model and end."""


class FinishReply(Body, frozen=True):
    """Where the final model lies (a Hugging Face folder)."""

    path: str
    version: Version


# -- orchestrator ------------------------------------------------------------------------------------------------


class ReplicaHello(Body, frozen=True):
    """`hello` of a rollout server, repeated every few seconds. `address`: where it can be reached."""

    name: Id
    address: Id
    capacity: Positive
    context_tokens: Positive


class ReplicaWelcome(Body, frozen=True):
    accepted: bool
    reason: str = ""
    heartbeat_s: float = 5.0


class ReplicaEntry(Body, frozen=True):
    name: str
    address: str


class OrchestratorInfo(Body, frozen=True):
    """`info` of the orchestrator. `replicas` is the set that the weight publisher serves."""

    revision: Count
    run: str
    term: Count
    replicas: list[ReplicaEntry]
    state: str
    counts: dict[str, int] = {}
