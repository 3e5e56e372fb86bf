//! Takes a node that is gone for good out of the mesh. Invariant: never one that is connected, because a server that
//! was removed and runs on votes again some minutes later.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use super::bootstrap;
use super::error::FabricError;
use super::identity::Identity;
use super::monitor;
use crate::core::names::NodeName;

const PATIENCE: Duration = Duration::from_secs(5);
/// JetStream does not know the server.
const NOT_A_MEMBER: u64 = 10044;

/// Has the cluster forget the server of `node`. It needs a leader: a majority of the servers it knows.
pub(super) async fn remove(identity: &Identity, node: &NodeName) -> Result<(), FabricError> {
    let failed = |reason: String| FabricError::Remove { node: node.clone(), reason };
    let connected = monitor::route_names(identity.ports.monitor)
        .await
        .map_err(|e| failed(format!("our own nats-server does not answer: {e}")))?;
    if connected.iter().any(|name| name == node.as_str()) {
        return Err(FabricError::StillRunning { node: node.clone() });
    }
    let options = identity.client_options(bootstrap::sys_options(&identity.accounts))?;
    let sys = options
        .connect(format!("nats://{}", identity.ports.client_address()))
        .await
        .map_err(|e| FabricError::Connect { reason: e.to_string() })?;
    let request = json!({ "peer": node.as_str() }).to_string();
    let answer = match timeout(PATIENCE, sys.request("$JS.API.SERVER.REMOVE", request.into())).await {
        Ok(Ok(message)) => serde_json::from_slice::<Value>(&message.payload).unwrap_or_default(),
        Ok(Err(_)) | Err(_) => {
            return Err(failed("the cluster has no leader: too few of its nodes run".to_owned()));
        }
    };
    match (answer["success"].as_bool(), answer["error"]["err_code"].as_u64()) {
        (Some(true), _) | (_, Some(NOT_A_MEMBER)) => Ok(()),
        _ => Err(failed(answer["error"]["description"].as_str().unwrap_or("no reason given").to_owned())),
    }
}
