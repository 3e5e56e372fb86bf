//! `litemesh leave`, `remove` and `rescue`: who belongs to the mesh. Invariant: what takes another node out is said first
//! and done only if it is confirmed.

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::args::{LeaveArgs, RemoveArgs, RescueArgs};
use super::node::client;
use crate::config::{self, Surroundings};
use crate::core::names::NodeName;
use crate::daemon::control_members::{RemoveAsk, RescueAsk};
use crate::daemon::leaving::LeaveAsk;
use crate::daemon::state_dir::is_in_use;
use crate::status::model::Status;

/// The cluster may take this long to agree.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long a node that left may take to end.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// `litemesh leave`.
pub fn leave(args: &LeaveArgs) -> Result<ExitCode> {
    // Each of its steps may take as long as was said.
    let client = client(&args.state, args.timeout * 3 + PATIENCE)?;
    let ask = LeaveAsk { timeout_ms: args.timeout.as_millis() as u64, drop_streams: args.drop_streams };
    print!("{}", client.post("/control/leave", &ask)?);
    let dir = config::state_dir(args.state.state_dir.as_deref(), &Surroundings::of_process())?;
    let asked = Instant::now();
    // Whoever asked may clear the directory away next, or start there again.
    while is_in_use(&dir) && asked.elapsed() < END_PATIENCE {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(ExitCode::SUCCESS)
}

/// `litemesh remove`.
pub fn remove(args: &RemoveArgs) -> Result<ExitCode> {
    let client = client(&args.state, PATIENCE)?;
    let node: NodeName = args.node.parse()?;
    print!("{}", client.post("/control/remove", &RemoveAsk { node: node.clone(), dry_run: true })?);
    if !args.yes && answer(&format!("take {node} out of the mesh? [y/N] "), "--yes")? != "y" {
        println!("nothing was changed");
        return Ok(ExitCode::FAILURE);
    }
    print!("{}", client.post("/control/remove", &RemoveAsk { node, dry_run: false })?);
    Ok(ExitCode::SUCCESS)
}

/// `litemesh rescue`.
pub fn rescue(args: &RescueArgs) -> Result<ExitCode> {
    let client = client(&args.state, PATIENCE)?;
    let status: Status = serde_json::from_str(&client.get("/api/status")?)?;
    let own = status.node;
    print!("{}", client.post("/control/rescue", &RescueAsk { dry_run: true })?);
    let given = match &args.confirm {
        Some(name) => name.clone(),
        None => answer("to go on, write the name of this node: ", &format!("--confirm {own}"))?,
    };
    if given != own {
        bail!("this node is called {own}, not {given:?}: nothing was changed");
    }
    print!("{}", client.post("/control/rescue", &RescueAsk { dry_run: false })?);
    Ok(ExitCode::SUCCESS)
}

/// What the operator says.
fn answer(question: &str, flag: &str) -> Result<String> {
    if !std::io::stdin().is_terminal() {
        bail!("nobody can be asked here: say {flag} if it is meant; nothing was changed");
    }
    print!("{question}");
    std::io::stdout().flush()?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim().to_owned())
}
