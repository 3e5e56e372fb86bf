//! Asking the node that runs on this host. Invariant: the secret goes only to the address that the state directory
//! names, which is on loopback.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::daemon::control::Contact;

/// A running node.
pub struct Client {
    contact: Contact,
    agent: ureq::Agent,
}

impl Client {
    /// The node with this state directory; requests may take `patience`.
    pub fn new(state_dir: &Path, patience: Duration) -> Result<Self> {
        let contact = Contact::read(state_dir)?;
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(patience + Duration::from_secs(10)))
            .http_status_as_error(false)
            .proxy(None)
            .build();
        Ok(Self { contact, agent: config.into() })
    }

    /// GET, as text.
    pub fn get(&self, path: &str) -> Result<String> {
        let bearer = format!("Bearer {}", self.contact.secret);
        let answer = self.agent.get(self.url(path)).header("authorization", bearer).call();
        self.text(answer)
    }

    /// POST of JSON, as text.
    pub fn post(&self, path: &str, body: &impl Serialize) -> Result<String> {
        let bearer = format!("Bearer {}", self.contact.secret);
        let answer = self.agent.post(self.url(path)).header("authorization", bearer).send_json(body);
        self.text(answer)
    }

    /// POST of JSON, as JSON.
    pub fn ask<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let text = self.post(path, body)?;
        serde_json::from_str(&text).context("the node's answer cannot be read: is it another release?")
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.contact.http)
    }

    fn text(&self, answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<String> {
        let mut answer = answer.with_context(|| {
            format!(
                "no node answers at {}: is 'litemesh up' running with this --state-dir?",
                self.contact.http
            )
        })?;
        let text = answer.body_mut().read_to_string().context("the node's answer was cut short")?;
        if !answer.status().is_success() {
            bail!("{}", text.trim());
        }
        Ok(text)
    }
}
