"""The wire between iGRPO's services: messages, codec, ZeroMQ server and clients. docs/protocol.md is its specification.

Imports no torch, no SGLang and no other room of this repository.
"""
