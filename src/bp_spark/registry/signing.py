"""Signatures of bundles: Ed25519 (RFC 8032) over the bytes of ``manifest.json``, which has the digest of every other file.

The signature, 64 bytes, lies beside the manifest as ``manifest.sig``. Keys are PEM, as OpenSSL makes them, and OpenSSL can
check a signature without this package::

    openssl genpkey -algorithm ed25519 -out signing.pem
    openssl pkey -in signing.pem -pubout -out signing.pub
    openssl pkeyutl -verify -pubin -inkey signing.pub -rawin -in manifest.json -sigfile manifest.sig
"""

from __future__ import annotations

from contextlib import suppress

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from bp_spark.core import secret
from bp_spark.core.config import SigningConfig
from bp_spark.core.errors import ConfigError


def private_key(config: SigningConfig) -> Ed25519PrivateKey | None:
    """The key that new bundles are signed with; ``None`` where none is set.

    Raises:
        ConfigError: it isn't there, is no such key, or is not the other half of the public key.
    """
    if config.private_key is None:
        return None
    pem = secret.read("signing.private_key", config.private_key)
    key = None
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):
        key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"signing.private_key: {config.private_key} is no Ed25519 private key in PEM without a password"
        )
    public = public_key(config)
    if public is not None and public != key.public_key():
        raise ConfigError("signing.private_key: is not the other half of signing.public_key")
    return key


def public_key(config: SigningConfig) -> Ed25519PublicKey | None:
    """The key that bundles must be signed for; ``None`` where none is set.

    Raises:
        ConfigError: it isn't there or is no such key.
    """
    if config.public_key is None:
        return None
    pem = secret.read("signing.public_key", config.public_key)
    key = None
    with suppress(ValueError, UnsupportedAlgorithm):
        key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"signing.public_key: {config.public_key} is no Ed25519 public key in PEM")
    return key


def is_signed(document: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether the signature is the key's over the document."""
    try:
        key.verify(signature, document)
    except InvalidSignature:
        return False
    return True
