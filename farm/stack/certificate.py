"""The certificate by which SeaweedFS's parts recognise each other: one key pair as authority, server and client.

Without it the inner gRPC ports obey every user of the machine.
"""

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from farm.stack.ports import LOOPBACK
from farm.stack.secrets import write_private

LIFE = timedelta(days=365 * 50)
"""Longer than any data directory lives: nothing here could renew it in time."""


def ensure_certificate(folder: Path) -> tuple[Path, Path]:
    """Paths of certificate and private key (PEM, mode 600) in `folder`, made on first use."""
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    if certificate_file.exists() and key_file.exists():
        return certificate_file, key_file
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "farm")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address(LOOPBACK))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    write_private(key_file, key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    write_private(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_file, key_file
