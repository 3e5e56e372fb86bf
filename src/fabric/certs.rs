//! Certificates out of the mesh key. Invariant: every holder of the key derives the same CA, byte for byte, and
//! nobody else can make a certificate that it signed.
//!
//! While the key is being changed a node trusts the CAs of both keys. Its own certificate is of the new one; with it goes
//! a certificate of the new CA by the old one, so that a node which has only the old key accepts it, too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::keyring::KeyRing;
use super::keys::MeshKey;
use super::private_file::{self, StateFileError};

/// The name every node's certificate has: nats-server checks it where it dials an IP address.
pub const COMMON_NAME: &str = "localhost";

/// The CA's certificate, in the directory of [`NodeCerts::save`].
pub const CA_FILE: &str = "ca.crt";

/// An Ed25519 private key in PKCS#8 is this and the seed.
const PKCS8_ED25519: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// The certificate could not be made.
    #[error("cannot make this node's certificate: {0}")]
    Mint(#[from] rcgen::Error),
    /// The certificate could not be kept.
    #[error(transparent)]
    File(#[from] StateFileError),
}

/// A node's certificate, its key, and the CAs that peers' are checked against.
pub struct NodeCerts {
    /// Of the current key first.
    trusted: Vec<rcgen::Certificate>,
    certificate: rcgen::Certificate,
    /// The current CA by the previous one.
    bridge: Option<rcgen::Certificate>,
    key: KeyPair,
}

/// Where nats-server finds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertFiles {
    /// The certificates of the CAs.
    pub ca: PathBuf,
    /// The node's certificate.
    pub certificate: PathBuf,
    /// The node's private key.
    pub key: PathBuf,
}

impl NodeCerts {
    /// A certificate for a node that is reached under `hosts` (names or IP addresses).
    pub fn mint(ring: &KeyRing, node: &str, hosts: &[String]) -> Result<Self, CertError> {
        let ca_key = ca_key(ring.current())?;
        let mut trusted = vec![ca_params(ring.current()).self_signed(&ca_key)?];
        let mut bridge = None;
        if let Some(previous) = ring.previous() {
            let old_key = self::ca_key(previous)?;
            trusted.push(ca_params(previous).self_signed(&old_key)?);
            let issuer = Issuer::new(ca_params(previous), old_key);
            bridge = Some(ca_params(ring.current()).signed_by(&ca_key, &issuer)?);
        }
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let issuer = Issuer::new(ca_params(ring.current()), ca_key);
        let certificate = node_params(node, hosts)?.signed_by(&key, &issuer)?;
        Ok(Self { trusted, certificate, bridge, key })
    }

    /// What a node would have whose mesh trusts these CAs and not its certificate.
    #[cfg(test)]
    pub(super) fn trusting(self, ca_of: Self) -> Self {
        Self { trusted: ca_of.trusted, ..self }
    }

    /// One whose time is over.
    #[cfg(test)]
    pub(super) fn expired(ring: &KeyRing, node: &str) -> Result<Self, CertError> {
        let mut certs = Self::mint(ring, node, &[])?;
        let mut params = node_params(node, &[])?;
        params.not_after = date_time_ymd(2001, 1, 1);
        let issuer = Issuer::new(ca_params(ring.current()), ca_key(ring.current())?);
        certs.certificate = params.signed_by(&certs.key, &issuer)?;
        Ok(certs)
    }

    /// Writes them into `dir`, for nats-server.
    pub fn save(&self, dir: &Path) -> Result<CertFiles, CertError> {
        let files =
            CertFiles { ca: dir.join(CA_FILE), certificate: dir.join("node.crt"), key: dir.join("node.key") };
        let pem = |all: &mut dyn Iterator<Item = &rcgen::Certificate>| {
            all.map(rcgen::Certificate::pem).collect::<String>()
        };
        private_file::write(&files.ca, pem(&mut self.trusted.iter()).as_bytes())?;
        private_file::write(&files.certificate, pem(&mut self.chain()).as_bytes())?;
        private_file::write(&files.key, self.key.serialize_pem().as_bytes())?;
        Ok(files)
    }

    /// For connections of our own to a node of the mesh: it must have a certificate of our CA, and gets ours.
    pub fn client_config(&self) -> Result<ClientConfig, rustls::Error> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        let chain = self.chain().map(|c| c.der().clone()).collect();
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(chain, key.into())
    }

    /// For connections of peers to us: theirs must be certificates of our CAs.
    pub fn server_config(&self) -> Result<ServerConfig, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let peers = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider.clone())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(peers)
            .with_single_cert(self.chain().map(|c| c.der().clone()).collect(), key.into())
    }

    fn roots(&self) -> Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        for ca in &self.trusted {
            roots.add(ca.der().clone())?;
        }
        Ok(roots)
    }

    /// What peers are shown.
    fn chain(&self) -> impl Iterator<Item = &rcgen::Certificate> {
        [&self.certificate].into_iter().chain(&self.bridge)
    }
}

fn ca_key(mesh: &MeshKey) -> Result<KeyPair, rcgen::Error> {
    let mut seeded = PKCS8_ED25519.to_vec();
    seeded.extend(mesh.ca_seed());
    KeyPair::try_from(&PrivatePkcs8KeyDer::from(seeded))
}

fn valid_for_ever(params: &mut CertificateParams) {
    // A host with a wrong clock must still find its mesh: the key is what expires, by rotation.
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2120, 1, 1);
}

fn ca_params(mesh: &MeshKey) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("litemesh {}", mesh.id()));
    params.serial_number = Some(SerialNumber::from(1u64));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    valid_for_ever(&mut params);
    params
}

fn node_params(node: &str, hosts: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, node);
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    valid_for_ever(&mut params);
    params.subject_alt_names = vec![
        SanType::DnsName(COMMON_NAME.try_into()?),
        SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        SanType::IpAddress(IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ];
    for host in hosts {
        let san = match host.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(host.as_str().try_into()?),
        };
        if !params.subject_alt_names.contains(&san) {
            params.subject_alt_names.push(san);
        }
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::crypto::ring::default_provider;
    use rustls::pki_types::{ServerName, UnixTime};

    use super::*;
    use crate::fabric::keys::KEY_LEN;

    fn mint(key: u8, node: &str, hosts: &[&str]) -> NodeCerts {
        of(&KeyRing::founded(MeshKey::from_bytes([key; KEY_LEN])), node, hosts)
    }

    fn of(ring: &KeyRing, node: &str, hosts: &[&str]) -> NodeCerts {
        let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
        NodeCerts::mint(ring, node, &hosts).expect("mints")
    }

    fn accepts(ca: &NodeCerts, node: &NodeCerts, name: &str, at_s: u64) -> bool {
        let mut roots = rustls::RootCertStore::empty();
        ca.trusted.iter().for_each(|ca| roots.add(ca.der().clone()).expect("a CA"));
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider()))
                .build()
                .expect("has a root");
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(at_s));
        let others: Vec<_> = node.bridge.iter().map(|c| c.der().clone()).collect();
        verifier.verify_server_cert(node.certificate.der(), &others, &name, &[], now).is_ok()
    }

    #[test]
    fn all_nodes_derive_the_same_ca() {
        let ca = |certs: &NodeCerts| certs.trusted[0].der().clone();
        assert_eq!(ca(&mint(1, "a", &[])), ca(&mint(1, "b", &["10.0.0.1"])));
        assert_ne!(ca(&mint(1, "a", &[])), ca(&mint(2, "a", &[])));
    }

    #[test]
    fn members_trust_each_other_whatever_their_clocks_say() {
        let (a, b, stranger) =
            (mint(1, "a", &[]), mint(1, "b", &["10.0.0.1", "b.example"]), mint(2, "b", &[]));
        let (y2001, y2100) = (1_000_000_000, 4_110_000_000);
        for at_s in [y2001, y2100] {
            for name in ["localhost", "127.0.0.1", "10.0.0.1", "b.example"] {
                assert!(accepts(&a, &b, name, at_s), "{name}");
            }
        }
        assert!(!accepts(&a, &b, "c.example", y2001));
        assert!(!accepts(&a, &stranger, "localhost", y2001));
    }

    #[test]
    fn while_the_key_changes_old_and_new_trust_each_other_and_afterwards_not() {
        let first = KeyRing::founded(MeshKey::from_bytes([1; KEY_LEN]));
        let both = first.changed().expect("randomness");
        let (old, changing) = (of(&first, "a", &[]), of(&both, "b", &[]));
        let new = of(&both.without_previous(), "c", &[]);
        let trust = |a: &NodeCerts, b: &NodeCerts| accepts(a, b, "localhost", 1_000_000_000);
        assert!(trust(&old, &changing) && trust(&changing, &old));
        assert!(trust(&new, &changing) && trust(&changing, &new));
        assert!(trust(&changing, &changing));
        assert!(!trust(&old, &new) && !trust(&new, &old));
    }
}
