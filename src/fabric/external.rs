//! A NATS system that somebody else runs, instead of servers of the nodes' own. Invariant: whoever may use the mesh's
//! subjects in its account is a member; nothing waits for that system but the first start.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::error::FabricError;
use super::members::Members;
use super::options::{ExternalNats, FabricOptions, StateDir};
use super::private_file;
use super::subjects::Subjects;
use crate::core::message::FRAGMENT_BYTES;
use crate::core::names::{MeshName, NodeName};

const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// Who is there answers at once.
const PRESENCE_PATIENCE: Duration = Duration::from_secs(2);
const EVENTS_PATIENCE: Duration = Duration::from_millis(50);
const FIRST_RECONNECT: Duration = Duration::from_millis(20);
const LAST_RECONNECT: Duration = Duration::from_secs(1);
/// What a piece of a message takes with everything around it.
const LEAST_PAYLOAD: usize = FRAGMENT_BYTES + 64 * 1024;
/// Any user may ask this of a server; the answer says that everything sent before has been read.
const WHO_AM_I: &str = "$SYS.REQ.USER.INFO";

/// What is known of the system and of the connection to it.
pub(super) struct External {
    /// Where it is, for people.
    pub(super) url: String,
    pub(super) mesh: MeshName,
    pub(super) state: StateDir,
    /// Tells this process from another one of the node's name.
    pub(super) run: u64,
    /// Another process goes by this node's name.
    twin: AtomicBool,
    line: Arc<Line>,
}

/// What the connection itself tells.
#[derive(Default)]
struct Line {
    is_away: AtomicBool,
    /// What the server does not permit.
    forbidden: Mutex<Option<String>>,
}

impl Line {
    fn heard(&self, event: &Event, url: &str) {
        match event {
            Event::Disconnected if !self.is_away.swap(true, Ordering::Relaxed) => {
                warn!("the NATS system at {url} is away: writes go on, and are sent when it is back");
            }
            Event::Connected if self.is_away.swap(false, Ordering::Relaxed) => {
                info!("the NATS system at {url} is back");
            }
            Event::ServerError(error) => {
                let text = error.to_string();
                let mut forbidden = self.forbidden.lock().expect("nothing panics while it is held");
                if text.to_lowercase().contains("permissions violation") && forbidden.is_none() {
                    warn!("the NATS system at {url} does not permit what litemesh needs: {text}");
                    *forbidden = Some(text);
                }
            }
            _ => debug!("nats: {event}"),
        }
    }

    fn forbidden(&self) -> Option<String> {
        self.forbidden.lock().expect("nothing panics while it is held").clone()
    }
}

/// What the state directory says.
#[derive(Serialize, Deserialize)]
struct Belongs {
    mesh: MeshName,
}

/// Refuses a state directory whose node meets its peers on a system of its operator's.
pub(super) fn expect_none(state: &StateDir) -> Result<(), FabricError> {
    match belongs(state)? {
        None => Ok(()),
        Some(Belongs { mesh }) => Err(FabricError::OtherSystem {
            dir: state.path().display().to_string(),
            other: format!("the mesh {mesh} on a NATS system of its operator's"),
            advice: "start it with --fabric-url as before, or with another --state-dir",
        }),
    }
}

fn belongs(state: &StateDir) -> Result<Option<Belongs>, FabricError> {
    let Some(bytes) = private_file::read(&state.external())? else { return Ok(None) };
    let damaged = |e: serde_json::Error| FabricError::System {
        what: "external.json in the state directory is damaged: remove it and start again",
        source: std::io::Error::other(e.to_string()),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}

impl External {
    /// Connects. A node that belongs goes on though the system is away; the first start wants it to be there.
    pub(super) async fn start(
        nats: &ExternalNats,
        options: &FabricOptions,
    ) -> Result<(Arc<Self>, Client, Members), FabricError> {
        let state = StateDir::new(&options.state_dir);
        let dir = || state.path().display().to_string();
        if state.key().exists() {
            let other = "a mesh of bundled servers".to_owned();
            let advice =
                "leave --fabric-url out; or have it leave that mesh first, or use another --state-dir";
            return Err(FabricError::OtherSystem { dir: dir(), other, advice });
        }
        let before = belongs(&state)?;
        if let Some(Belongs { mesh }) = before.as_ref().filter(|b| b.mesh != nats.mesh) {
            let other = format!("the mesh {mesh}");
            let advice = "start it with that --fabric-mesh, or with another --state-dir";
            return Err(FabricError::OtherSystem { dir: dir(), other, advice });
        }
        let mut members = Members::load(&state.members())?.unwrap_or_default();
        let external = Self {
            url: nats.url(),
            mesh: nats.mesh.clone(),
            run: rand::random(),
            twin: AtomicBool::new(false),
            line: Arc::default(),
            state,
        };
        let client = external.connect(nats, &options.node, before.is_some()).await?;
        if client.connection_state() == async_nats::connection::State::Connected {
            let subjects = Subjects::of_mesh(&nats.mesh);
            external.look(&client, &subjects, &options.node).await?;
            // Their logs tell of nodes that are away, and that there is a mesh.
            for node in external.log_owners(&client, &subjects).await {
                if node != options.node && members.gone().all(|gone| *gone != node) {
                    members.learn(&node, &[]);
                }
            }
        }
        Ok((Arc::new(external), client, members))
    }

    /// Writes down that this node belongs: from now on it starts without the system, too.
    pub(super) fn settle(&self, members: &Members) -> Result<(), FabricError> {
        members.save(&self.state.members())?;
        let text = serde_json::to_vec(&Belongs { mesh: self.mesh.clone() }).expect("strings become JSON");
        Ok(private_file::write(&self.state.external(), &text)?)
    }

    fn unusable(&self, reason: impl Into<String>) -> FabricError {
        FabricError::External { url: self.url.clone(), reason: reason.into() }
    }

    async fn connect(
        &self,
        nats: &ExternalNats,
        node: &NodeName,
        belongs: bool,
    ) -> Result<Client, FabricError> {
        let first = self.options(nats, node).await?.connect(&nats.servers[..]);
        let error = match timeout(CONNECT_PATIENCE, first).await {
            Ok(Ok(client)) => return Ok(client),
            Ok(Err(error)) => error,
            Err(_) => ConnectError::new(ConnectErrorKind::TimedOut),
        };
        let (reason, is_away) = explain(&error);
        if !belongs || !is_away {
            return Err(self.unusable(reason));
        }
        warn!(
            "the NATS system at {} is away ({reason}): writes go on, and are sent when it is back",
            self.url
        );
        self.line.is_away.store(true, Ordering::Relaxed);
        let later = self.options(nats, node).await?.retry_on_initial_connect();
        later.connect(&nats.servers[..]).await.map_err(|e| self.unusable(explain(&e).0))
    }

    async fn options(&self, nats: &ExternalNats, node: &NodeName) -> Result<ConnectOptions, FabricError> {
        let unreadable = |path: &std::path::Path, why: &dyn std::fmt::Display| {
            self.unusable(format!("{} cannot be used: {why}", path.display()))
        };
        let mut options = match (&nats.credentials, &nats.user, &nats.password) {
            (Some(file), ..) => {
                ConnectOptions::with_credentials_file(file).await.map_err(|e| unreadable(file, &e))?
            }
            (None, Some(user), Some(password)) => {
                ConnectOptions::with_user_and_password(user.clone(), password.clone())
            }
            (None, Some(token), None) => ConnectOptions::with_token(token.clone()),
            (None, None, _) => ConnectOptions::new(),
        };
        for file in nats.ca.iter().chain(nats.certificate.iter().flat_map(|(cert, key)| [cert, key])) {
            std::fs::metadata(file).map_err(|e| unreadable(file, &e))?;
        }
        if let Some(ca) = &nats.ca {
            options = options.add_root_certificates(ca.clone());
        }
        if let Some((cert, key)) = &nats.certificate {
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
        let wants_tls = nats.ca.is_some()
            || nats.certificate.is_some()
            || nats.servers.iter().any(|server| server.starts_with("tls://"));
        let (line, url) = (self.line.clone(), self.url.clone());
        Ok(options
            .name(format!("litemesh {node}"))
            .no_echo()
            .require_tls(wants_tls)
            .max_reconnects(None)
            .connection_timeout(CONNECT_PATIENCE / 2)
            .ping_interval(Duration::from_secs(5))
            .reconnect_delay_callback(|attempt| {
                let attempt = u32::try_from(attempt).unwrap_or(u32::MAX);
                FIRST_RECONNECT.saturating_mul(attempt).min(LAST_RECONNECT)
            })
            // Every subject is made of names that were checked.
            .skip_subject_validation(true)
            .event_callback(move |event| {
                line.heard(&event, &url);
                async {}
            }))
    }

    /// Whether the system will do for us.
    async fn look(&self, client: &Client, subjects: &Subjects, node: &NodeName) -> Result<(), FabricError> {
        if client.max_payload() < LEAST_PAYLOAD {
            return Err(self.unusable(format!(
                "it takes messages of {} bytes at most, and litemesh needs {LEAST_PAYLOAD}: raise its max_payload",
                client.max_payload()
            )));
        }
        if self.is_there(client, subjects, node).await {
            return Err(self.unusable(format!(
                "another node of the mesh {} is called {node} too: choose another name with --name",
                self.mesh
            )));
        }
        self.permits(client).await
    }

    /// After something was tried: whether the server permitted it.
    pub(super) async fn permits(&self, client: &Client) -> Result<(), FabricError> {
        let answered = timeout(ANSWER_PATIENCE, client.request(WHO_AM_I, "".into())).await;
        // The client tells of what was refused before it in a task of its own.
        tokio::time::sleep(EVENTS_PATIENCE).await;
        let missing = |what: &str| {
            self.unusable(format!(
                "its user lacks permissions ({what}): it must publish and subscribe lm-{}.> and _INBOX.>, and publish \
                 $SYS.REQ.USER.INFO, $JS.API.> and cdc.>",
                self.mesh
            ))
        };
        match (self.line.forbidden(), answered) {
            (Some(what), _) => Err(missing(&what)),
            (None, Ok(Ok(_))) => Ok(()),
            (None, Ok(Err(e))) => Err(missing(&format!("{WHO_AM_I}: {e}"))),
            (None, Err(_)) => Err(missing(&format!("{WHO_AM_I} is not answered"))),
        }
    }

    /// The nodes that have a log there.
    async fn log_owners(&self, client: &Client, subjects: &Subjects) -> Vec<NodeName> {
        let ask = json!({ "subject": subjects.all_commits() }).to_string();
        let asked = client.request("$JS.API.STREAM.NAMES", ask.into());
        let Ok(Ok(answer)) = timeout(ANSWER_PATIENCE, asked).await else { return Vec::new() };
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
        let names = answer["streams"].as_array().into_iter().flatten();
        names.filter_map(|name| subjects.node_of_stream(name.as_str()?)).collect()
    }

    /// Whether a node of this name answers.
    pub(super) async fn is_there(&self, client: &Client, subjects: &Subjects, node: &NodeName) -> bool {
        let asked = client.request(subjects.presence(node), "".into());
        matches!(timeout(PRESENCE_PATIENCE, asked).await, Ok(Ok(answer)) if answer.status.is_none())
    }

    /// Answers that this node is there, until it is aborted.
    pub(super) async fn be_there(client: Client, mut asked: async_nats::Subscriber) {
        while let Some(message) = asked.next().await {
            if let Some(reply) = message.reply {
                // Who asks asks again.
                drop(client.publish(reply, "{}".into()).await);
            }
        }
    }

    /// A hello of this node's name arrived.
    pub(super) fn heard_own_name(&self, node: &NodeName, run: Option<u64>) {
        if run != Some(self.run) && !self.twin.swap(true, Ordering::Relaxed) {
            warn!("{}", twin_text(node));
        }
    }

    /// What an operator has to look at.
    pub(super) fn notices(&self, node: &NodeName) -> Vec<String> {
        let twin = self.twin.load(Ordering::Relaxed).then(|| twin_text(node));
        let forbidden = self.line.forbidden().map(|what| {
            format!("the NATS system at {} does not permit what litemesh needs: {what}", self.url)
        });
        twin.into_iter().chain(forbidden).collect()
    }

    /// Deletes a node's log. What cannot be deleted is taken over by a node of that name.
    pub(super) async fn delete_log(&self, client: &Client, subjects: &Subjects, node: &NodeName) {
        let subject = format!("$JS.API.STREAM.DELETE.{}", subjects.stream(node));
        let answer = timeout(ANSWER_PATIENCE, client.request(subject, "".into())).await;
        debug!(%node, deleted = matches!(answer, Ok(Ok(_))), "its log");
    }

    /// What is not litemesh's here.
    pub(super) fn not_ours(&self, instead: &'static str) -> FabricError {
        FabricError::NotOurs { url: self.url.clone(), instead }
    }
}

fn twin_text(node: &NodeName) -> String {
    format!(
        "another node of the mesh is called {node} too: neither hears the other; stop one of them, and start it with another \
         --name and an empty --state-dir"
    )
}

/// What an error means for the operator, and whether the system may just be away.
fn explain(error: &ConnectError) -> (String, bool) {
    let text = error.to_string();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            let advice = "check the user and password in --fabric-url, or --fabric-credentials";
            (format!("it does not let this node in ({text}): {advice}"), false)
        }
        _ if has(&["UnknownIssuer", "BadSignature", "CaUsedAsEndEntity"]) => {
            let advice = "name the file of its CA with --fabric-ca";
            (format!("its certificate is of no CA that is trusted here ({text}): {advice}"), false)
        }
        _ if has(&["NotValidForName", "not valid for name"]) => {
            let advice = "name a host in --fabric-url that it has a certificate for";
            (format!("its certificate is for another name ({text}): {advice}"), false)
        }
        _ if has(&["CertificateRequired", "BadCertificate", "UnknownCA", "DecryptError"]) => {
            let advice = "give one that it accepts with --fabric-cert and --fabric-key";
            (format!("it wants a certificate of ours ({text}): {advice}"), false)
        }
        ConnectErrorKind::Tls | ConnectErrorKind::ServerParse => (
            format!(
                "{text}: check --fabric-url, and the files of --fabric-ca, --fabric-cert and --fabric-key"
            ),
            false,
        ),
        _ => (format!("it cannot be reached ({text}): is it running, and is this its client port?"), true),
    }
}
