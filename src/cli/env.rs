//! `litemesh env`. Invariant: what is printed is what the running node listens with at this moment.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::args::EnvArgs;
use super::client::Client;
use crate::config::{self, Surroundings};
use crate::fabric::StateDir;
use crate::fabric::accounts::{APP_USER, Accounts};
use crate::status::model::Status;

/// Runs the command.
pub fn run(args: &EnvArgs) -> Result<ExitCode> {
    let dir = config::state_dir(args.state.state_dir.as_deref(), &Surroundings::of_process())?;
    let status = Client::new(&dir, Duration::from_secs(10))?.get("/api/status")?;
    let status: Status = serde_json::from_str(&status).context("the node's answer cannot be read")?;
    if status.fabric.external {
        return tell_external(&status, args.json);
    }
    let accounts = Accounts::load_or_create(&StateDir::new(&dir).accounts())?;
    let (url, password) = (&status.fabric.client_url, accounts.app.reveal());
    if args.json {
        let settings = json!({ "url": url, "user": APP_USER, "password": password, "node": status.node });
        println!("{}", serde_json::to_string_pretty(&settings)?);
    } else {
        for (name, value) in
            [("NATS_URL", url.as_str()), ("NATS_USER", APP_USER), ("NATS_PASSWORD", password)]
        {
            println!("export {name}={}", quote(value));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Programs have what lets them in from the system's operator; this node's own is not for them.
fn tell_external(status: &Status, json: bool) -> Result<ExitCode> {
    let url = &status.fabric.client_url;
    if json {
        println!("{}", serde_json::to_string_pretty(&json!({ "url": url, "node": status.node }))?);
    } else {
        println!("export NATS_URL={}", quote(url));
        eprintln!("what lets programs in there is for the operator of that NATS system to give");
    }
    Ok(ExitCode::SUCCESS)
}

/// A word of the shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
