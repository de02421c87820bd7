"""Pairs of keys in files, as OpenSSL makes them."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from bp_spark.core.config import SigningConfig


def new_keys(folder: Path) -> SigningConfig:
    """Writes ``signing.pem`` and ``signing.pub`` into a new folder."""
    folder.mkdir()
    key = Ed25519PrivateKey.generate()
    private, public = folder / "signing.pem", folder / "signing.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return SigningConfig(private_key=f"file:{private}", public_key=f"file:{public}")
