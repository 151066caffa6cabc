"""What is read of certificates, and where a connection may go without."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.proto.credentials import check_link, host_of, is_loopback, read_credentials

from ..fakes.certificates import Authority, Identity


def test_the_files_become_credentials_that_do_not_show_the_key(identity: Identity) -> None:
    credentials = identity.credentials("shard.test")
    assert credentials.certificate == Path(identity.tls_cert).read_bytes()
    assert credentials.authority == Path(identity.tls_ca).read_bytes()
    assert credentials.name == "shard.test"
    assert "PRIVATE" not in repr(credentials)


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-key", "--tls-ca"])
def test_a_file_that_cannot_be_read_is_named(identity: Identity, flag: str) -> None:
    missing = replace(identity, **{flag[2:].replace("-", "_"): "/nowhere"})
    with pytest.raises(ValueError, match=rf"^{flag} /nowhere cannot be read: No such file or directory$"):
        read_credentials(missing)


def test_a_key_of_another_certificate_is_refused(identity: Identity, stranger: Identity) -> None:
    with pytest.raises(ValueError, match=r"^--tls-key .* does not belong to --tls-cert .*$"):
        read_credentials(replace(identity, tls_key=stranger.tls_key))


@pytest.mark.parametrize("field", ["tls_cert", "tls_key"])
def test_what_is_no_certificate_or_key_is_refused(identity: Identity, tmp_path: Path, field: str) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match=r"are no certificate and its unencrypted key in PEM$"):
        read_credentials(replace(identity, **{field: str(tmp_path / "text")}))


def test_an_encrypted_key_is_refused_without_a_question(identity: Identity, tmp_path: Path) -> None:
    encrypted = str(tmp_path / "encrypted.key")
    command = ["openssl", "ec", "-in", identity.tls_key, "-aes256", "-passout", "pass:x", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ValueError, match="unencrypted key"):
        read_credentials(replace(identity, tls_key=encrypted))


def test_an_authority_without_a_certificate_is_refused(identity: Identity) -> None:
    with pytest.raises(ValueError, match=r"^--tls-ca .* holds no certificate in PEM$"):
        read_credentials(replace(identity, tls_ca=identity.tls_key))


@pytest.mark.parametrize(
    "given",
    [{"tls_cert": "a"}, {"tls_cert": "a", "tls_key": "b"}, {"tls_key": "b", "tls_ca": "c"}],
)
def test_all_three_files_or_none(given: dict[str, str]) -> None:
    none = Identity(None, None, None)  # type: ignore[arg-type]
    assert read_credentials(none) is None
    check_link(none, ["127.0.0.1"])
    with pytest.raises(ValueError, match="give all three or none"):
        check_link(replace(none, **given), ["127.0.0.1"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_plaintext_stays_on_this_machine(host: str) -> None:
    assert is_loopback(host)
    check_link(Identity(None, None, None), [host])  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "", "shard-0.example", "localhost.example"])
def test_plaintext_over_a_network_must_be_asked_for(host: str) -> None:
    none = Identity(None, None, None)  # type: ignore[arg-type]
    assert not is_loopback(host)
    with pytest.raises(ValueError, match=rf"{host}.*--tls-cert.*--plaintext on"):
        check_link(none, ["127.0.0.1", host])
    check_link(replace(none, plaintext=True), [host])
    check_link(Identity("a", "b", "c"), [host])


@pytest.mark.parametrize(
    ("address", "host"), [("127.0.0.1:1", "127.0.0.1"), ("[::1]:1", "::1"), ("a.b:1", "a.b"), ("x", "")]
)
def test_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host


def test_an_authority_can_sign_several(authority: Authority, identity: Identity) -> None:
    other = authority.issue("DNS:shard.test")
    assert other.credentials().authority == identity.credentials().authority
