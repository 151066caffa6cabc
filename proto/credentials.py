"""How router and shard prove to each other who they are, and where they may talk without."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

_REMEDY = (
    "protect the connection between router and shard with --tls-cert, --tls-key and --tls-ca, "
    "or let it go unprotected with --plaintext on"
)


class LinkSettings(Protocol):
    """The part of a router's or a shard's configuration that says how the two are connected."""

    @property
    def tls_cert(self) -> str | None: ...
    @property
    def tls_key(self) -> str | None: ...
    @property
    def tls_ca(self) -> str | None: ...
    @property
    def plaintext(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A certificate with its key, and the authority that must have signed the other side's. All in PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes
    name: str | None = None
    """What a shard's certificate must be made out to; None: to the host at which it is reached."""


def read_credentials(settings: LinkSettings, name: str | None = None) -> Credentials | None:
    """What the settings name; None where they name nothing.

    Raises:
        ValueError: a file cannot be read, is no certificate or key, or the two do not belong together.
            One line that names the flag.
    """
    certificate, key, authority = settings.tls_cert, settings.tls_key, settings.tls_ca
    if certificate is None or key is None or authority is None:
        return None
    credentials = Credentials(
        certificate=_read("--tls-cert", certificate),
        key=_read("--tls-key", key),
        authority=_read("--tls-ca", authority),
        name=name,
    )
    _check_pair(certificate, key)
    _check_authority(authority)
    return credentials


def check_link(settings: LinkSettings, hosts: Iterable[str]) -> None:
    """ValueError where the settings of TLS are incomplete, or plaintext would leave this machine unasked."""
    files = (settings.tls_cert, settings.tls_key, settings.tls_ca)
    if any(files) and not all(files):
        raise ValueError("--tls-cert, --tls-key and --tls-ca belong together: give all three or none")
    if any(files) or settings.plaintext:
        return
    for host in hosts:
        if not is_loopback(host):
            raise ValueError(f"{host or 'an empty host'} is not a loopback address: {_REMEDY}")


def is_loopback(host: str) -> bool:
    """Whether a host is surely this machine. Of names only `localhost`: no other one is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(address: str) -> str:
    """The host of host:port."""
    return address.rpartition(":")[0].strip("[]")


def _read(flag: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}") from None


def _check_pair(certificate: str, key: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # else it would ask at the terminal
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise ValueError(f"--tls-key {key} does not belong to --tls-cert {certificate}") from None
        raise ValueError(
            f"--tls-cert {certificate} and --tls-key {key} are no certificate and its unencrypted key in PEM"
        ) from None


def _check_authority(path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"--tls-ca {path} holds no certificate in PEM") from None
