"""A TLS handshake in memory: whether a certificate will do, before processes that need it are started."""

from __future__ import annotations

import ssl
from contextlib import suppress

from .proto.credentials import LinkSettings


def rehearse(settings: LinkSettings, name: str) -> None:
    """Have both sides, with the same files, meet each other, the shard under `name`. Without files: nothing.

    Raises:
        ValueError: they would not trust each other; one line says why.
    """
    if settings.tls_cert is None:
        return
    to_shard, to_router = ssl.MemoryBIO(), ssl.MemoryBIO()
    router = _context(ssl.PROTOCOL_TLS_CLIENT, settings).wrap_bio(to_router, to_shard, server_hostname=name)
    shard = _context(ssl.PROTOCOL_TLS_SERVER, settings).wrap_bio(to_shard, to_router, server_side=True)
    try:
        for side in (router, shard, router, shard):
            _advance(side)
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message.rstrip(".")
        hint = "; --tls-name says to what it is made out" if "mismatch" in reason else ""
        raise ValueError(
            f"--tls-cert {settings.tls_cert} would not do for a shard at {name}: {reason}{hint}"
        ) from None


def _context(protocol: ssl._SSLMethod, settings: LinkSettings) -> ssl.SSLContext:
    assert settings.tls_cert is not None
    context = ssl.SSLContext(protocol)
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    context.load_verify_locations(settings.tls_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _advance(side: ssl.SSLObject) -> None:
    with suppress(ssl.SSLWantReadError):
        side.do_handshake()
