"""Signatures of bundles: Ed25519 (RFC 8032) over ``manifest.json``, which has the digest of every other file.

The signature, 64 bytes, lies beside the manifest as ``manifest.sig``. Keys are PEM files of OpenSSL, which also checks a
signature without this package::

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
    """Return the key that signs new bundles; ``None`` where none is set.

    Raises:
        ConfigError: the key is missing, is no Ed25519 key in PEM, or doesn't belong to the public key.
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
    """Return the key that checks the signatures of bundles; ``None`` where none is set.

    Raises:
        ConfigError: the key is missing or no Ed25519 key in PEM.
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
    """Return whether a signature is that of the document by the key."""
    try:
        key.verify(signature, document)
    except InvalidSignature:
        return False
    return True
