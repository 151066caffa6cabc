"""Certificates made for a test by the `openssl` command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraplex.proto.credentials import Credentials, read_credentials

_CONFIG = """
[req]
distinguished_name = nobody
[nobody]
[authority]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign
subjectKeyIdentifier = hash
"""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Identity:
    """Files of one side of a connection, as its configuration names them."""

    tls_cert: str
    tls_key: str
    tls_ca: str
    plaintext: bool = False

    @property
    def flags(self) -> list[str]:
        return ["--tls-cert", self.tls_cert, "--tls-key", self.tls_key, "--tls-ca", self.tls_ca]

    def credentials(self, name: str | None = None) -> Credentials:
        read = read_credentials(self, name)
        assert read is not None
        return read


class Authority:
    """Signs certificates. Skips the test where `openssl` is missing."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("the openssl command is not installed")
        self._folder = folder
        self._config = folder / "openssl.cnf"
        self._config.write_text(_CONFIG)
        self.certificate, self._key = folder / "ca.pem", folder / "ca.key"
        self._openssl(
            *(
                "req",
                "-x509",
                *_NEW_KEY,
                "-days",
                "2",
                "-subj",
                f"/CN={folder.name}",
                "-extensions",
                "authority",
            ),
            *("-config", self._config, "-keyout", self._key, "-out", self.certificate),
        )

    def issue(self, alternatives: str, *, usage: str = "serverAuth,clientAuth") -> Identity:
        """A certificate for, say, `DNS:shard.test,IP:127.0.0.1`. `usage`: which sides may show it."""
        name = self._folder / alternatives.translate(str.maketrans(":,.", "---")).lower()
        request, extensions = name.with_suffix(".csr"), name.with_suffix(".ext")
        certificate, key = name.with_suffix(".pem"), name.with_suffix(".key")
        extensions.write_text(
            f"subjectAltName = {alternatives}\nextendedKeyUsage = {usage}\nauthorityKeyIdentifier = keyid\n"
        )
        self._openssl(
            *("req", "-new", *_NEW_KEY, "-subj", "/CN=loraplex test", "-config", self._config),
            *("-keyout", key, "-out", request),
        )
        self._openssl(
            *(
                "x509",
                "-req",
                "-in",
                request,
                "-CA",
                self.certificate,
                "-CAkey",
                self._key,
                "-CAcreateserial",
            ),
            *("-days", "2", "-extfile", extensions, "-out", certificate),
        )
        return Identity(str(certificate), str(key), str(self.certificate))

    def _openssl(self, *words: str | Path) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, timeout=60)
