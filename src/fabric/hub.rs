//! The connection of the programs' account to another NATS system, as seen from here. Invariant: it is only looked at;
//! nats-server makes it, and nothing waits for it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::error::FabricError;
use super::identity::Identity;
use super::monitor;
use super::options::LeafHub;
use super::server::Server;

const PERIOD: Duration = Duration::from_secs(1);
/// A hub that is only started anew is back by then.
const PATIENCE: Duration = Duration::from_secs(5);

/// What an operator has to know of the hub.
pub(super) struct Hub {
    options: LeafHub,
    trouble: Mutex<Option<String>>,
}

impl Hub {
    /// Refuses files that cannot be read: nats-server would not start without one of them.
    pub(super) fn new(options: &LeafHub) -> Result<Self, FabricError> {
        let readable = |what: &'static str, path: Option<&Path>| match path
            .map(|path| (path, std::fs::File::open(path)))
        {
            Some((path, Err(e))) => {
                let source = std::io::Error::new(e.kind(), format!("{}: {e}", path.display()));
                Err(FabricError::System { what, source })
            }
            _ => Ok(()),
        };
        readable("cannot read the file of --leaf-ca", options.ca.as_deref())?;
        readable("cannot read the file of --leaf-credentials", options.credentials.as_deref())?;
        Ok(Self { options: options.clone(), trouble: Mutex::default() })
    }

    /// Why it is not connected, while it is not.
    pub(super) fn notice(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Where it is, without what lets us in.
    fn place(&self) -> &str {
        let url = &self.options.url;
        url.rsplit_once('@').map_or(url, |(_, place)| place)
    }

    /// What nats-server said of it, in words of ours.
    fn explain(&self, said: &str) -> String {
        let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
        let why = if has(&["Authorization Violation", "Authentication"]) {
            match self.options.credentials {
                Some(_) => "it does not let this node in: check --leaf-credentials",
                None => {
                    "it does not let this node in: check the user and password in the URL of --leaf-url, or \
                     --leaf-credentials"
                }
            }
        } else if has(&["unknown authority", "not trusted"]) {
            "its certificate is of no CA that is trusted here: name the file of its CA with --leaf-ca"
        } else if has(&[
            "certificate is valid for",
            "cannot validate certificate",
            "certificate is not valid for any",
        ]) {
            "its certificate is for another name: name a host in --leaf-url that it has a certificate for"
        } else if has(&["expired or is not yet valid"]) {
            "its certificate has expired, or is not valid yet: look at it, and at this host's clock"
        } else if has(&["first record does not look like a TLS handshake"]) {
            "it does not encrypt: write nats-leaf:// in --leaf-url if that is meant to be so, and check the port"
        } else if has(&["Credentials file"]) {
            "the file of --leaf-credentials holds no credentials: it is made with 'nsc generate creds'"
        } else {
            "it cannot be reached: is it running, and is this its leafnode port?"
        };
        format!("the hub at {} is not connected: {why}; everything else works", self.place())
    }
}

/// Until it is aborted: tells when the hub comes and goes.
pub(super) async fn watch(hub: Arc<Hub>, server: Arc<Server>, identity: Arc<Identity>) {
    let (mut looks, mut said, mut since) = (0u32, None, Instant::now());
    loop {
        sleep(PERIOD).await;
        said = server.said_of_hub().or(said);
        // One that is about to be refused is seen, too, for a moment.
        looks = if monitor::has_leaf(identity.ports.monitor, "APP").await { looks + 1 } else { 0 };
        if looks == 2 {
            info!("the programs' account is connected to the hub at {}", hub.place());
            hub.set(None);
        }
        if looks > 0 {
            (said, since) = (None, Instant::now());
        } else if since.elapsed() >= PATIENCE {
            let trouble = hub.explain(said.as_deref().unwrap_or_default());
            if hub.notice().as_ref() != Some(&trouble) {
                warn!("{trouble}");
                hub.set(Some(trouble));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(url: &str) -> Hub {
        Hub {
            options: LeafHub { url: url.to_owned(), credentials: None, ca: None },
            trouble: Mutex::default(),
        }
    }

    #[test]
    fn what_is_said_of_it_is_explained_without_its_password() {
        let hub = hub("tls://u:hidden@hub.example:7422");
        for (said, told) in [
            ("Leafnode Error 'Authorization Violation'", "user and password"),
            ("TLS leafnode handshake error: tls: x509: certificate signed by unknown authority", "--leaf-ca"),
            ("x509: certificate is valid for a.example, not hub.example", "another name"),
            ("x509: certificate has expired or is not yet valid", "clock"),
            ("Error trying to connect as leafnode to remote server: connection refused", "cannot be reached"),
            ("", "cannot be reached"),
        ] {
            let text = hub.explain(said);
            assert!(text.contains(told) && text.contains("hub.example:7422"), "{said}: {text}");
            assert!(!text.contains("hidden"));
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let options =
            LeafHub { url: "tls://h".to_owned(), credentials: Some("/no/such/file".into()), ca: None };
        let error = Hub::new(&options).err().expect("refused").to_string();
        assert!(error.contains("--leaf-credentials") && error.contains("/no/such/file"), "{error}");
    }
}
