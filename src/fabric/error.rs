//! Why the fabric does not work. Invariant: a message says what happened, to which address, node or file, and what to
//! do next; none holds a secret.

use std::io;
use std::path::PathBuf;

use super::accounts::AccountsError;
use super::address::{Address, AddressError};
use super::certs::CertError;
use super::keys::KeyError;
use super::members::MembersError;
use super::preflight::PreflightError;
use super::private_file::StateFileError;
use super::token::TokenError;
use crate::core::names::NodeName;

/// Why the fabric does not start, or did not take a message.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// Another process uses the state directory.
    #[error("another litemesh runs with {}: stop it, or choose another directory with --state-dir", dir.display())]
    StateDirInUse {
        /// The directory.
        dir: PathBuf,
    },
    /// Another process listens where peers should connect.
    #[error("{address} is taken by another process: stop it, or choose another port with --cluster")]
    ClusterPortTaken {
        /// What we wanted to listen on.
        address: Address,
    },
    /// Another process listens where programs should connect.
    #[error("{address} is taken by another process: stop it, or choose another port with --client")]
    ClientPortTaken {
        /// What we wanted to listen on.
        address: Address,
    },
    /// The peers of the token cannot be joined.
    #[error(transparent)]
    Join(#[from] PreflightError),
    /// The state directory belongs to a node of another mesh than the token.
    #[error(
        "this node already belongs to another mesh: leave --join out, or start with an empty --state-dir"
    )]
    BelongsElsewhere,
    /// The token has another key than this node, and nobody of the token's says what mesh it is for.
    #[error(
        "this node already belongs to a mesh, by another key than the token's; whether it is the same mesh with a new key cannot be found out: {reason}"
    )]
    OtherKey {
        /// Why not.
        reason: PreflightError,
    },
    /// The mesh's key is being changed already.
    #[error(
        "the mesh's key is being changed already, and not all nodes have the new one ({}): wait for them, take those that are gone for good out with 'litemesh remove', or end it with 'litemesh token --drop-old'", .waiting_for.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    KeyChanging {
        /// Who has not got the new one.
        waiting_for: Vec<NodeName>,
    },
    /// The node that was to be joined has our name.
    #[error("the node at {address} is called {node} too: choose another name with --name")]
    NameTaken {
        /// Where it was found.
        address: Address,
        /// The name.
        node: NodeName,
    },
    /// The node that was to be removed is connected.
    #[error("{node} is running: stop it first, or have it leave")]
    StillRunning {
        /// The node.
        node: NodeName,
    },
    /// Something answers where the node that is to be removed was.
    #[error(
        "{node} does not seem to be gone: something answers at {address}; stop it first, or have it leave"
    )]
    StillReachable {
        /// The node.
        node: NodeName,
        /// Where it listened.
        address: Address,
    },
    /// The node that was to be removed never belonged, or was forgotten.
    #[error("{node} is no member of this mesh: its members are {}", known(members))]
    NoMember {
        /// The node.
        node: NodeName,
        /// Those that are.
        members: Vec<NodeName>,
    },
    /// This node cannot leave now.
    #[error("this node does not leave: {reason}; nothing is lost, and it goes on as before")]
    Leave {
        /// What stands in the way.
        reason: String,
    },
    /// The cluster was not rescued.
    #[error("not rescued: {reason}")]
    Rescue {
        /// What stands in the way.
        reason: String,
    },
    /// The cluster did not remove a node.
    #[error("{node} is not removed: {reason}")]
    Remove {
        /// The node.
        node: NodeName,
        /// What stood in the way.
        reason: String,
    },
    /// A list of peers without the secret that they share.
    #[error("--peers needs the mesh's key, the same on every node: name a file with it with --key-file")]
    NoKey,
    /// `--advertise` is no address.
    #[error("--advertise: {0}")]
    Advertise(#[from] AddressError),
    /// The join token cannot be made.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The mesh key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The certificates.
    #[error(transparent)]
    Cert(#[from] CertError),
    /// The passwords.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// The list of members.
    #[error(transparent)]
    Members(#[from] MembersError),
    /// Another file of the state directory.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
    /// nats-server cannot be unpacked or started.
    #[error(transparent)]
    Launch(#[from] nats_launcher::LaunchError),
    /// nats-server does not get ready.
    #[error("nats-server does not start: {reason}")]
    Server {
        /// Its last words.
        reason: String,
    },
    /// The first node could not found its cluster.
    #[error("cannot found the cluster within {waited_s} s: {reason}; starting again goes on from there")]
    Bootstrap {
        /// How long it was tried.
        waited_s: u64,
        /// What was missing last.
        reason: String,
    },
    /// Our own server does not let us in.
    #[error("cannot connect to our own nats-server: {reason}")]
    Connect {
        /// What the client said.
        reason: String,
    },
    /// The NATS system that was named cannot be used.
    #[error("cannot use the NATS system at {url}: {reason}")]
    External {
        /// Where it is.
        url: String,
        /// What is the matter, and what to do.
        reason: String,
    },
    /// The state directory's mesh meets in another way than the options say.
    #[error("{dir} belongs to a node of {other}: {advice}")]
    OtherSystem {
        /// The directory.
        dir: String,
        /// What it belongs to.
        other: String,
        /// What to do.
        advice: &'static str,
    },
    /// What was asked is not litemesh's where it runs on another NATS system.
    #[error("this mesh runs over the NATS system at {url}, which is not litemesh's own: {instead}")]
    NotOurs {
        /// Where that is.
        url: String,
        /// What to do.
        instead: &'static str,
    },
    /// There is no connection to our own server: the message was not sent.
    #[error("not sent: our own nats-server is not connected")]
    NotConnected,
    /// Our own server takes nothing: the message was not sent.
    #[error("not sent: our own nats-server does not take messages")]
    Stalled,
    /// A stream of the host's programs that takes changes of rows has not answered to all of them.
    #[error("a stream that takes {subject} does not answer")]
    Untaken {
        /// What it takes, as programs see it.
        subject: String,
    },
    /// The message is too large: it was not sent.
    #[error("not sent: a message of {len} bytes is larger than the limit of {limit}")]
    TooLarge {
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// The system refused something local.
    #[error("{what}: {source}")]
    System {
        /// What we tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn known(members: &[NodeName]) -> String {
    let names: Vec<&str> = members.iter().map(NodeName::as_str).collect();
    if names.is_empty() { "none but this node".to_owned() } else { names.join(", ") }
}
