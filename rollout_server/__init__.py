"""Rollout server: SGLang behind ZeroMQ. Samples drafts and refinements, streams them back, takes new weights.

config.py        settings, importable without torch        service.py       endpoints and main()
templates.py     prompts and q' from token ids (pure)      generation.py    one request: N samples, streamed
tokenizer.py     tokenizer of the model                    admission.py     who runs next
engine_child.py  process that hosts sglang.Engine          weights.py       staging, manifests, the switch
engine.py        its handle, one life of it                supervisor.py    restarts it; state, version, revision
link.py          frames between server and child           cpu_stub/        stands in for sgl_kernel without CUDA
updates.py       weights.* endpoints                       preload.py       one import for SGLang's helpers (CPU)
safetensors_file.py  headers and checksums without torch
"""
