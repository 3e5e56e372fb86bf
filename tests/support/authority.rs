//! Certificates of servers that are not ours.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// Writes a text to a file, and returns its path.
pub fn file(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// A CA, and a certificate of it for loopback: certificate and key.
pub fn authority(dir: &Path, name: &str) -> (String, String, String) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap();
    let issuer = Issuer::from_params(&params, &key);
    let own = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&own, &issuer).unwrap();
    (
        file(dir, &format!("{name}.ca"), &ca.pem()),
        file(dir, &format!("{name}.crt"), &leaf.pem()),
        file(dir, &format!("{name}.key"), &own.serialize_pem()),
    )
}
