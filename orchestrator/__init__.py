"""The conductor: every prompt runs drafts -> verdicts -> choice -> refinements -> verdicts -> batch by itself.

Decisions are pure state machines (pipeline, membership, selection, rewards, data); asyncio is a thin shell (conductor).
Imports neither torch nor any other room but protocol.
"""
