"""Imported by the fork server of an engine child (engine_child.fork_from_one_import), and by nothing else.

Its forks inherit the pipe by which a fork server notices its parent's end, so it must be told by the kernel; SGLang's
helpers then die with the fork server, by their own PDEATHSIG.
"""

from __future__ import annotations

import importlib

from protocol.process import die_with_parent

die_with_parent()
for module in ("sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager"):
    importlib.import_module(module)
