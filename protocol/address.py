"""Addresses that a service may listen on, and what is refused before ZeroMQ sees it."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat

import zmq

from protocol.errors import AddressError

MAX_IPC_PATH_BYTES = 107  # sun_path without its terminating zero


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check(address: str, insecure: bool) -> None:
    """Raise AddressError unless a service may listen here; remove an ipc socket file that nobody listens on."""
    if address.startswith("tcp://"):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if not host or not (port == "*" or (port.isdigit() and int(port) < 65536)):
            raise AddressError(f"bad address: {address} (expected tcp://host:port)")
        if not insecure and not is_loopback(host):
            raise AddressError(f"refused to listen at {address}: plain tcp beyond loopback needs `insecure: true`")
    elif address.startswith("ipc:///"):
        _check_ipc(address, address.removeprefix("ipc://"))
    else:
        raise AddressError(f"bad address: {address} (expected tcp://host:port or ipc:///path)")


def _check_ipc(address: str, path: str) -> None:
    if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise AddressError(f"bad address: {address} (a socket path holds at most {MAX_IPC_PATH_BYTES} bytes)")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(path)):
            raise AddressError(f"bad address: {address} (its folder does not exist)") from None
        return
    except OSError as error:
        raise AddressError(f"bad address: {address} ({error.strerror})") from None
    if not stat.S_ISSOCK(mode):
        raise AddressError(f"address in use: {address} (the file there is not a socket)")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            raise AddressError(f"address in use: {address} ({error.strerror or error})") from None
        else:
            raise AddressError(f"address in use: {address}")


def bind(router: zmq.Socket[bytes], address: str, insecure: bool) -> str:
    """Bind and return the real address (port 0 gets its number). Raises AddressError."""
    check(address, insecure)
    router.setsockopt(zmq.IPV6, int("[" in address))
    wanted = address[:-2] + ":*" if address.endswith(":0") else address
    try:
        router.bind(wanted)
    except zmq.ZMQError as error:
        reason = "address in use" if error.errno == zmq.EADDRINUSE else "cannot listen"
        raise AddressError(f"{reason}: {address} ({zmq.strerror(error.errno or 0)})") from None
    return router.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # pyright: ignore[reportAttributeAccessIssue]
