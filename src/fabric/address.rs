//! Where a node can be reached. Invariant: what parses can be dialled and prints the way it was meant.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// There is no `:port` at the end.
    #[error("the address {0:?} has no port: write host:port, or [host]:port for IPv6")]
    NoPort(String),
    /// What stands there is no port.
    #[error("the address {0:?} has a port that is not a number from 1 to 65535")]
    BadPort(String),
    /// The host is empty, or has characters no host name has.
    #[error("the address {0:?} has no valid host")]
    BadHost(String),
}

/// A host, by name or IP address, and a port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// The host, an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The host, when it is an IP address.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(socket: std::net::SocketAddr) -> Self {
        Self { host: socket.ip().to_string(), port: socket.port() }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (host, port) = text.rsplit_once(':').ok_or_else(|| AddressError::NoPort(text.to_owned()))?;
        let port = match port.parse() {
            Ok(0) | Err(_) => return Err(AddressError::BadPort(text.to_owned())),
            Ok(port) => port,
        };
        let bad_host = || AddressError::BadHost(text.to_owned());
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(inner) => inner.parse::<Ipv6Addr>().map_err(|_| bad_host())?.to_string(),
            None => host.to_owned(),
        };
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let valid = host.parse::<Ipv6Addr>().is_ok() && text.starts_with('[')
            || !host.is_empty() && host.chars().all(named);
        if valid { Ok(Self { host, port }) } else { Err(bad_host()) }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;
    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_print_as_they_parse() {
        for text in ["10.0.0.1:6222", "node-b.example.com:1", "[fe80::1]:6222", "localhost:65535"] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), text);
        }
        assert_eq!("[0:0::1]:5".parse::<Address>().expect("v6").to_string(), "[::1]:5");
    }

    #[test]
    fn what_cannot_be_dialled_is_refused() {
        assert!(matches!("host".parse::<Address>(), Err(AddressError::NoPort(_))));
        for bad in ["host:0", "host:70000", "host:", "host:x"] {
            assert!(matches!(bad.parse::<Address>(), Err(AddressError::BadPort(_))), "{bad}");
        }
        for bad in [":1", "[]:1", "::1:1", "[host]:1", "a b:1", "a\"b:1", "a/b:1"] {
            assert!(matches!(bad.parse::<Address>(), Err(AddressError::BadHost(_))), "{bad}");
        }
    }
}
