//! Commands that ask the running node: `token`, `status`, `sync`, `detach`. Invariant: exit code 0 only if what was
//! asked for is so.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use super::args::{DetachArgs, StateArgs, StatusArgs, SyncArgs, TokenArgs};
use super::client::Client;
use crate::config::{self, Surroundings};
use crate::daemon::control::{Contact, DetachAsk, SyncAnswer, SyncAsk};
use crate::daemon::control_key::{KeyAnswer, KeyAsk};
use crate::daemon::state_dir::lock_database;
use crate::replica::adopt;
use crate::sqlite;
use crate::status::model::Status;
use crate::status::table;

const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for the other nodes to have a new key.
const KEY_PATIENCE: Duration = Duration::from_secs(15);

pub(super) fn client(state: &StateArgs, patience: Duration) -> Result<Client> {
    Client::new(&config::state_dir(state.state_dir.as_deref(), &Surroundings::of_process())?, patience)
}

/// `litemesh token`.
pub fn token(args: &TokenArgs) -> Result<ExitCode> {
    let client = client(&args.state, PATIENCE + KEY_PATIENCE)?;
    if !args.rotate && !args.drop_old {
        println!("{}", client.get("/control/token")?.trim());
        return Ok(ExitCode::SUCCESS);
    }
    let wait_ms = KEY_PATIENCE.as_millis() as u64;
    let ask = KeyAsk { rotate: args.rotate, drop_old: args.drop_old, wait_ms };
    let answer: KeyAnswer = client.ask("/control/key", &ask)?;
    println!("{}", answer.token);
    // The token alone on stdout, so that it can go into a file.
    if args.rotate {
        eprintln!("The mesh has a new key: this is its token from now on, tokens made before are of no use.");
    }
    if answer.without.is_empty() {
        eprintln!("All nodes have the new key; the old one is accepted no more.");
    } else {
        eprintln!(
            "Not all nodes have the new key yet: {}. Until they have, the old one is accepted as well; a node that is away \
             gets it when it is back. If one is gone for good: litemesh remove NODE, or litemesh token --drop-old.",
            answer.without.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// `litemesh status`.
pub fn status(args: &StatusArgs) -> Result<ExitCode> {
    let client = client(&args.state, PATIENCE)?;
    loop {
        let text = client.get("/api/status")?;
        let status: Status = serde_json::from_str(&text).context("the node's answer cannot be read")?;
        if args.watch {
            // Clears the terminal.
            print!("\x1b[H\x1b[2J");
        }
        if args.json {
            println!("{}", serde_json::to_string_pretty(&status)?);
        } else {
            print!("{}", table::render(&status, terminal_width()));
        }
        if !args.watch {
            return Ok(if status.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// The terminal's width in columns; 100 where there is none.
fn terminal_width() -> u16 {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.ok().map(|s| s.ws_col).filter(|columns| *columns > 0).unwrap_or(100)
}

/// `litemesh sync`.
pub fn sync(args: &SyncArgs) -> Result<ExitCode> {
    let client = client(&args.state, args.timeout)?;
    let db = args.database.as_deref().map(str::parse).transpose()?;
    let ask = SyncAsk { db, timeout_ms: args.timeout.as_millis() as u64 };
    let answer: SyncAnswer = client.ask("/control/sync", &ask)?;
    if answer.laggards.is_empty() {
        match answer.nodes {
            0 => println!("no other node is live: the others get it when they are back"),
            1 => println!("1 other node has everything ({} ms)", answer.took_ms),
            n => println!("{n} other nodes have everything ({} ms)", answer.took_ms),
        }
        return Ok(ExitCode::SUCCESS);
    }
    for (node, db) in &answer.laggards {
        eprintln!("litemesh: node {node} does not have everything of {db} after {} ms", answer.took_ms);
    }
    Ok(ExitCode::FAILURE)
}

/// `litemesh detach`.
pub fn detach(args: &DetachArgs) -> Result<ExitCode> {
    let path = std::path::absolute(&args.database)?;
    let conn = sqlite::open_replica(&path)?;
    if !adopt::is_adopted(&conn)? {
        println!("{} is not replicated: there is nothing to remove", path.display());
        return Ok(ExitCode::SUCCESS);
    }
    drop(conn);
    match lock_database(&path) {
        Ok(_lock) => {
            adopt::detach(&sqlite::open_replica(&path)?)?;
            println!(
                "detached {}: its rows are as they were, nothing of litemesh is left in it",
                path.display()
            );
        }
        Err(busy) => {
            let dir = config::state_dir(args.state.state_dir.as_deref(), &Surroundings::of_process())?;
            print!("{}", ask_to_detach(&dir, &path).context(busy)?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn ask_to_detach(state_dir: &Path, path: &Path) -> Result<String> {
    Contact::read(state_dir)?;
    Client::new(state_dir, Duration::from_secs(120))?
        .post("/control/detach", &DetachAsk { path: path.to_owned() })
}
