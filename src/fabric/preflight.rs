//! Looks at a peer before it is joined, so that an operator is told what is wrong and not that something is.
//! Invariant: it sends nothing that a stranger could use, and ends in bounded time.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError};
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::address::Address;
use super::certs::{COMMON_NAME, NodeCerts};
use super::conf;

const DIAL_PATIENCE: Duration = Duration::from_secs(3);
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);
/// Who sends his first line unasked does so at once.
const PLAIN_PATIENCE: Duration = Duration::from_millis(500);
const MAX_INFO: u64 = 64 * 1024;

/// Why a peer cannot be joined at an address.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// The name does not resolve.
    #[error("cannot join {address}: no such host ({reason}): check the name, or join by IP address")]
    NoSuchHost {
        /// Whom we dialled.
        address: Address,
        /// What the resolver said.
        reason: String,
    },
    /// Nobody listens there.
    #[error(
        "cannot join {address}: connection refused: is litemesh running there, and is this its cluster port?"
    )]
    Refused {
        /// Whom we dialled.
        address: Address,
    },
    /// No answer, or no way there.
    #[error("cannot join {address}: {source}: is there a firewall between?")]
    Unreachable {
        /// Whom we dialled.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// Something else listens there.
    #[error("cannot join {address}: it is {what}, not the cluster port of a node")]
    NotAPeer {
        /// Whom we dialled.
        address: Address,
        /// What answered.
        what: &'static str,
    },
    /// It is a node, of another mesh.
    #[error(
        "cannot join {address}: the token is for another mesh, or the mesh's key was changed since: get a new one with `litemesh token` there"
    )]
    OtherMesh {
        /// Whom we dialled.
        address: Address,
    },
    /// It is a node of our mesh, but does not know that it is called that.
    #[error(
        "cannot join {address}: the node there has no certificate for this name: start it with --advertise {address}, or join by its IP address"
    )]
    NotItsName {
        /// Whom we dialled.
        address: Address,
    },
    /// It is a node of our mesh that is none yet.
    #[error(
        "cannot join {address}: the node there waits for its mesh to be founded: start the others of its --peers"
    )]
    Waits {
        /// Whom we dialled.
        address: Address,
    },
    /// Encryption failed in some other way.
    #[error("cannot join {address}: TLS failed: {reason}")]
    Tls {
        /// Whom we dialled.
        address: Address,
        /// What the library said.
        reason: String,
    },
}

impl PreflightError {
    /// Of several addresses' errors the one that tells most is shown.
    fn tells(&self) -> u8 {
        match self {
            Self::OtherMesh { .. } => 7,
            Self::NotItsName { .. } => 6,
            Self::Waits { .. } => 5,
            Self::Tls { .. } => 4,
            Self::NotAPeer { .. } => 3,
            Self::Unreachable { .. } => 2,
            Self::Refused { .. } => 1,
            Self::NoSuchHost { .. } => 0,
        }
    }
}

/// A peer that would take us in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// The mesh that it is of.
    pub mesh_id: Option<String>,
    /// Where it was found.
    pub address: Address,
}

impl Peer {
    /// By what it says of itself.
    pub(super) fn introduced(info: &Value, address: &Address) -> Self {
        let text = |field: &str| info[field].as_str().unwrap_or_default().to_owned();
        let mesh_id = conf::mesh_of_cluster(&text("cluster"));
        Self { name: text("server_name"), mesh_id, address: address.clone() }
    }
}

/// The first peer that would take us in; otherwise the most telling error. `addresses` must not be empty.
pub async fn any(addresses: &[Address], certs: &NodeCerts) -> Result<Peer, PreflightError> {
    let mut attempts: FuturesUnordered<_> = addresses.iter().map(|address| check(address, certs)).collect();
    let mut telling: Option<PreflightError> = None;
    while let Some(result) = attempts.next().await {
        match result {
            Ok(peer) => return Ok(peer),
            Err(error) if telling.as_ref().is_none_or(|other| error.tells() > other.tells()) => {
                telling = Some(error);
            }
            Err(_) => {}
        }
    }
    Err(telling.expect("a token has addresses"))
}

/// Whether the node at `address` is of the mesh of `certs` and takes us for one of it too.
pub async fn check(address: &Address, certs: &NodeCerts) -> Result<Peer, PreflightError> {
    let stream = match shake_hands(dial(address).await?, address, certs).await {
        // Whatever does not speak TLS may say in plain text what it is.
        Err(PreflightError::Tls { reason, .. }) => return Err(identify(address, reason).await),
        result => result?,
    };
    // With TLS 1.3 our side of the handshake is done before the peer has looked at our certificate: what it thinks of
    // it shows on the first read. A member says who it is.
    let info = introduction(&mut BufReader::new(stream), address).await?;
    if !info["litemesh"].is_null() {
        return Err(PreflightError::Waits { address: address.clone() });
    }
    Ok(Peer::introduced(&info, address))
}

/// What whoever listens at one of an address's sockets says of itself, and the connection.
pub(super) async fn look(
    address: &Address,
    socket: SocketAddr,
    certs: &NodeCerts,
) -> Result<(Value, BufReader<Tls>), PreflightError> {
    let unreachable = |source| PreflightError::Unreachable { address: address.clone(), source };
    let stream = match timeout(DIAL_PATIENCE, TcpStream::connect(socket)).await {
        Ok(stream) => stream.map_err(unreachable)?,
        Err(_) => return Err(unreachable(io::ErrorKind::TimedOut.into())),
    };
    let mut stream = BufReader::new(shake_hands(stream, address, certs).await?);
    let info = introduction(&mut stream, address).await?;
    Ok((info, stream))
}

async fn introduction(stream: &mut BufReader<Tls>, address: &Address) -> Result<Value, PreflightError> {
    match timeout(ANSWER_PATIENCE, read_info(stream)).await {
        Ok(Ok(info)) => Ok(info),
        Ok(Err(e)) => Err(classify(&e, address)),
        Err(_) => {
            let source = io::ErrorKind::TimedOut.into();
            Err(PreflightError::Unreachable { address: address.clone(), source })
        }
    }
}

/// What listens at an address that is no cluster port.
async fn identify(address: &Address, reason: String) -> PreflightError {
    let not_a_peer = |what| PreflightError::NotAPeer { address: address.clone(), what };
    let stream = match dial(address).await {
        Ok(stream) => stream,
        Err(error) => return error,
    };
    match timeout(PLAIN_PATIENCE, read_info(BufReader::new(stream))).await {
        Ok(Ok(info)) if !info["client_id"].is_null() => not_a_peer("a nats-server's client port"),
        Ok(Ok(_)) => not_a_peer("a port of some other nats-server"),
        Ok(Err(e)) if e.kind() == io::ErrorKind::InvalidData => not_a_peer("no nats-server"),
        Ok(Err(_)) | Err(_) => PreflightError::Tls { address: address.clone(), reason },
    }
}

async fn dial(address: &Address) -> Result<TcpStream, PreflightError> {
    let unreachable = |source| PreflightError::Unreachable { address: address.clone(), source };
    let found = timeout(DIAL_PATIENCE, lookup_host((address.host(), address.port()))).await;
    let no_such_host = |reason| PreflightError::NoSuchHost { address: address.clone(), reason };
    let sockets: Vec<SocketAddr> = match found {
        Err(_) => return Err(no_such_host("the resolver does not answer".to_owned())),
        Ok(Err(e)) => return Err(no_such_host(e.to_string())),
        Ok(Ok(sockets)) => sockets.collect(),
    };
    let mut last = None;
    for socket in sockets {
        match timeout(DIAL_PATIENCE, TcpStream::connect(socket)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(e)) => last = Some(e),
            Err(_) => last = Some(io::ErrorKind::TimedOut.into()),
        }
    }
    match last {
        None => Err(no_such_host("it has no address".to_owned())),
        Some(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            Err(PreflightError::Refused { address: address.clone() })
        }
        Some(e) => Err(unreachable(e)),
    }
}

async fn read_info(mut stream: impl AsyncBufRead + Unpin) -> io::Result<Value> {
    let mut line = Vec::new();
    (&mut stream).take(MAX_INFO).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let json = line.strip_prefix(b"INFO ").ok_or(io::ErrorKind::InvalidData)?;
    serde_json::from_slice(json).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

pub(super) type Tls = tokio_rustls::client::TlsStream<TcpStream>;

async fn shake_hands(stream: TcpStream, address: &Address, certs: &NodeCerts) -> Result<Tls, PreflightError> {
    let tls_failed = |reason: String| PreflightError::Tls { address: address.clone(), reason };
    let config = certs.client_config().map_err(|e| tls_failed(e.to_string()))?;
    // As nats-server does it: names are checked as they are, IP addresses under the name that every node has.
    let name = if address.ip().is_some() { COMMON_NAME } else { address.host() };
    let name = ServerName::try_from(name.to_owned()).map_err(|e| tls_failed(e.to_string()))?;
    let connector = TlsConnector::from(Arc::new(config));
    match timeout(ANSWER_PATIENCE, connector.connect(name, stream)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(e)) => Err(classify(&e, address)),
        Err(_) => Err(tls_failed("the handshake does not end".to_owned())),
    }
}

fn classify(error: &io::Error, address: &Address) -> PreflightError {
    use rustls::Error as Tls;
    let address = address.clone();
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>()) {
        Some(Tls::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => PreflightError::NotItsName { address },
        // Their certificate is not of our CA, or ours is not of theirs.
        Some(
            Tls::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)
            | Tls::AlertReceived(
                AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::DecryptError,
            ),
        ) => PreflightError::OtherMesh { address },
        Some(other) => PreflightError::Tls { address, reason: other.to_string() },
        None => PreflightError::Tls { address, reason: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::keyring::KeyRing;
    use crate::fabric::keys::MeshKey;
    use crate::fabric::{Fabric, FabricOptions};

    /// Both sides of "another mesh", at a real server: we do not trust it, and it does not trust us.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_wrong_key_is_told_whoever_notices_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let [cluster, client] = crate::fabric::server::free_loopback().expect("ports");
        let node = "a".parse().expect("a name");
        let options = FabricOptions::new(node, dir.path().join("state"), cluster, client);
        let (fabric, _incoming) = Fabric::start(options).await.expect("starts");
        let address = Address::from(cluster);
        let key = fabric.join_token().expect("a token").key().clone();
        let mint = |key: &MeshKey| NodeCerts::mint(&KeyRing::founded(key.clone()), "b", &[]).expect("mints");
        let other = MeshKey::generate().expect("randomness");

        let peer = check(&address, &mint(&key)).await.expect("a member is welcome");
        let mesh_id = Some(fabric.mesh_id());
        assert_eq!(peer, Peer { name: "a".to_owned(), mesh_id, address: address.clone() });
        let error = check(&address, &mint(&other)).await.expect_err("we do not trust it");
        assert!(matches!(error, PreflightError::OtherMesh { .. }), "{error}");
        let error =
            check(&address, &mint(&other).trusting(mint(&key))).await.expect_err("it does not trust us");
        assert!(matches!(error, PreflightError::OtherMesh { .. }), "{error}");
        let expired = NodeCerts::expired(&KeyRing::founded(key.clone()), "b").expect("mints");
        check(&address, &expired).await.expect_err("its time is over");
        let by_name = format!("ip6-localhost:{}", cluster.port()).parse::<Address>().expect("an address");
        let error = classify_name(&by_name, cluster, &mint(&key)).await;
        assert!(matches!(error, PreflightError::NotItsName { .. }), "{error}");
        fabric.shutdown().await;
    }

    /// Dials the node, and expects it to have a certificate for another name.
    async fn classify_name(name: &Address, at: SocketAddr, certs: &NodeCerts) -> PreflightError {
        let stream = TcpStream::connect(at).await.expect("it listens");
        shake_hands(stream, name, certs).await.map(drop).expect_err("it is not called that")
    }
}
