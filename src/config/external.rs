//! The NATS system that nodes meet on instead of servers of their own, as configured. Invariant: what lets us in there is
//! never printed.

use std::fmt;
use std::path::PathBuf;

use super::raw::Raw;
use super::valid::absolute;
use super::{ConfigError, raw};
use crate::core::names::MeshName;

/// What the mesh is called by default.
pub const DEFAULT_FABRIC_MESH: &str = "litemesh";
const DEFAULT_PORT: u16 = 4222;

/// See the module.
#[derive(Clone, PartialEq, Eq)]
pub struct External {
    /// Its client ports, as `nats://host:port` or `tls://host:port`.
    pub servers: Vec<String>,
    /// A user's name; without a password, a token.
    pub user: Option<String>,
    /// The user's password.
    pub password: Option<String>,
    /// A file with credentials.
    pub credentials: Option<PathBuf>,
    /// A file with its CA.
    pub ca: Option<PathBuf>,
    /// Files with a certificate of ours and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The mesh's name.
    pub mesh: MeshName,
}

impl fmt::Debug for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("External")
            .field("servers", &self.servers)
            .field("mesh", &self.mesh)
            .finish_non_exhaustive()
    }
}

/// That of merged options, without those that make no sense beside it.
pub(super) fn external(raw: &Raw) -> Result<Option<External>, ConfigError> {
    let Some(url) = &raw.fabric_url else {
        let alone = [
            ("fabric_credentials", raw.fabric_credentials.is_some()),
            ("fabric_ca", raw.fabric_ca.is_some()),
            ("fabric_cert", raw.fabric_cert.is_some()),
            ("fabric_key", raw.fabric_key.is_some()),
            ("fabric_mesh", raw.fabric_mesh.is_some()),
        ];
        return match alone.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(ConfigError::Needs { option, other: "fabric_url" }),
            None => Ok(None),
        };
    };
    let own_server = [
        ("cluster", raw.cluster.is_some(), "no server of its own listens for peers"),
        ("advertise", raw.advertise.is_some(), "no server of its own listens for peers"),
        ("client", raw.client.is_some(), "no server of its own listens for programs"),
        ("join", raw.join.is_some(), "whoever is let in there belongs, without a token"),
        ("join_file", raw.join_file.is_some(), "whoever is let in there belongs, without a token"),
        ("peers", raw.peers.is_some(), "the nodes meet there"),
        ("key_file", raw.key_file.is_some(), "whoever is let in there belongs, without a key"),
        ("leaf_url", raw.leaf_url.is_some(), "programs connect to it themselves"),
    ];
    if let Some((option, _, reason)) = own_server.into_iter().find(|(_, given, _)| *given) {
        return Err(ConfigError::Together { first: "fabric_url", second: option, reason });
    }
    let (mut servers, mut user, mut password) = (Vec::new(), None, None);
    for part in url.split(',') {
        let server = Server::parse(part.trim()).ok_or_else(wrong_url)?;
        servers.push(server.address);
        if user.is_none() {
            (user, password) = (server.user, server.password);
        }
    }
    if user.is_some() && raw.fabric_credentials.is_some() {
        let reason = "the URL has a user already";
        return Err(ConfigError::Together { first: "fabric_url", second: "fabric_credentials", reason });
    }
    let certificate = match (&raw.fabric_cert, &raw.fabric_key) {
        (Some(cert), Some(key)) => Some((absolute(cert), absolute(key))),
        (None, None) => None,
        (Some(_), None) => return Err(ConfigError::Needs { option: "fabric_cert", other: "fabric_key" }),
        (None, Some(_)) => return Err(ConfigError::Needs { option: "fabric_key", other: "fabric_cert" }),
    };
    let mesh = raw.fabric_mesh.as_deref().unwrap_or(DEFAULT_FABRIC_MESH);
    Ok(Some(External {
        servers,
        user,
        password,
        credentials: raw.fabric_credentials.as_deref().map(absolute),
        ca: raw.fabric_ca.as_deref().map(absolute),
        certificate,
        mesh: mesh.parse().map_err(|e| ConfigError::value("fabric_mesh", mesh, format!("{e}")))?,
    }))
}

fn wrong_url() -> ConfigError {
    let reason = "write the client port of the NATS system, such as nats://nats.example:4222 or tls://nats.example:4222; \
                  several with commas between; a user and a password go before an @";
    ConfigError::value("fabric_url", raw::NOT_SHOWN, reason)
}

struct Server {
    address: String,
    user: Option<String>,
    password: Option<String>,
}

impl Server {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        if !matches!(scheme, "nats" | "tls") {
            return None;
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (login, place) =
            rest.rsplit_once('@').map_or((None, rest), |(login, place)| (Some(login), place));
        let (host, port) = match place.rsplit_once(':') {
            // The colons of an IPv6 address are in brackets.
            Some((host, port)) if !port.contains(']') => (host, port.parse().ok()?),
            _ => (place, DEFAULT_PORT),
        };
        let is_v6 = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .is_some_and(|h| h.parse::<std::net::Ipv6Addr>().is_ok());
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if port == 0 || host.is_empty() || !(is_v6 || host.chars().all(plain)) {
            return None;
        }
        let (user, password) = match login {
            None => (None, None),
            Some(login) => match login.split_once(':') {
                Some((user, password)) => (Some(decode(user)?), Some(decode(password)?)),
                None => (Some(decode(login)?), None),
            },
        };
        if user.as_deref() == Some("") {
            return None;
        }
        Some(Self { address: format!("{scheme}://{host}:{port}"), user, password })
    }
}

/// A part of a URL with what is written as `%` and two digits.
fn decode(text: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next()?, rest.next()?];
        bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(url: &str) -> Result<Option<External>, ConfigError> {
        external(&Raw { fabric_url: Some(url.to_owned()), ..Raw::default() })
    }

    #[test]
    fn a_url_may_hold_a_login_that_is_not_shown() {
        let found = of("nats://me:p%40ss%3A@a.example,tls://[::1]:7/").unwrap().unwrap();
        assert_eq!(found.servers, ["nats://a.example:4222", "tls://[::1]:7"]);
        assert_eq!((found.user.as_deref(), found.password.as_deref()), (Some("me"), Some("p@ss:")));
        assert!(!format!("{found:?}").contains("p@ss") && found.mesh.as_str() == DEFAULT_FABRIC_MESH);
        let token = of("tls://s3cret@h:1").unwrap().unwrap();
        assert_eq!((token.user.as_deref(), token.password), (Some("s3cret"), None));
        for wrong in [
            "",
            "h:4222",
            "http://h",
            "nats://",
            "nats://h:x",
            "nats://u:hidden@h:0",
            "nats://a b",
            "nats://:p@h",
        ] {
            let text = of(wrong).unwrap_err().to_string();
            assert!(text.contains("--fabric-url") && !text.contains("hidden"), "{wrong}: {text}");
        }
    }

    #[test]
    fn what_makes_no_sense_together_is_refused() {
        let with = |change: fn(&mut Raw)| {
            let mut raw = Raw { fabric_url: Some("nats://h".to_owned()), ..Raw::default() };
            change(&mut raw);
            external(&raw).unwrap_err().to_string()
        };
        let text = with(|r| r.cluster = Some("0.0.0.0:6222".to_owned()));
        assert!(text.contains("--fabric-url") && text.contains("--cluster"), "{text}");
        assert!(with(|r| r.join = Some("lm1-x".to_owned())).contains("--join"));
        assert!(with(|r| r.peers = Some(Vec::new())).contains("--peers"));
        assert!(with(|r| r.leaf_url = Some("tls://h".to_owned())).contains("--leaf-url"));
        assert!(with(|r| r.fabric_cert = Some("c".into())).contains("--fabric-key"));
        assert!(with(|r| r.fabric_mesh = Some("a.b".to_owned())).contains("--fabric-mesh"));
        let two = Raw { fabric_credentials: Some("c".into()), ..Raw::default() };
        assert!(external(&two).unwrap_err().to_string().contains("--fabric-url"));
    }
}
