"""The two ends of a connection between router and shard: over mutual TLS, or plain where none is set."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio

from .credentials import Credentials


def open_channel(
    address: str, options: Sequence[tuple[str, int]], credentials: Credentials | None
) -> grpc.aio.Channel:
    """A channel to the shard at host:port."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    named = [("grpc.ssl_target_name_override", credentials.name)] if credentials.name else []
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate),
        options=[*options, *named],
    )


def listen(server: grpc.aio.Server, host: str, port: int, credentials: Credentials | None) -> int:
    """Have a server listen; answers the port. With credentials, to those alone who show a certificate of the
    same authority. Raises RuntimeError if it cannot."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(
        address,
        grpc.ssl_server_credentials(
            [(credentials.key, credentials.certificate)], credentials.authority, require_client_auth=True
        ),
    )
