//! Has elections held as soon as there can be one. A nats-server that has lost its majority stands for election every 4 to 9
//! seconds: after its peer is back it may let 9 more go by in which nothing new can be made. Invariant: what is said here is
//! what Raft lets anybody say at any time. It names a candidate that nobody has and nobody may vote for; a server with a log
//! that hears of it stands itself, within a second, and is elected, or not, by the rules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::debug;

use super::bootstrap;
use super::departure::peer_id;
use super::error::FabricError;
use super::identity::Identity;
use super::monitor::{self, RaftGroup};

/// How often it is seen who is connected: whoever came anew in between is seen by the number of the connection.
const PERIOD: Duration = Duration::from_secs(2);
/// Alone, what is waited for is that somebody comes.
const PERIOD_ALONE: Duration = Duration::from_millis(500);
/// While there may be an election to ask for.
const PERIOD_ATTENTIVE: Duration = Duration::from_millis(200);
/// So long after the connections changed.
const ATTENTIVE: Duration = Duration::from_secs(20);
/// Or until every group was led at so many looks.
const LED_LOOKS: u32 = 10;
/// A server that hears of an election stands within 0.8 s; the answers travel, too.
const ASK_AGAIN: Duration = Duration::from_millis(2_000);
/// Where that did not help, the servers do it in their own time: in a slow network more of it would be in their way.
const MAX_ASKED: u32 = 4;
/// Those that may have streams, and the one whose group decides where these are.
const ACCOUNTS: [&str; 3] = ["SYS", "MESH", "APP"];
/// Eight bytes, as all names of candidates; those of servers have no such meaning.
const NOBODY: &[u8; 8] = b"litemesh";

/// What was seen of a group without a leader, and done about it.
#[derive(Debug, Default, Clone, Copy)]
struct Waiting {
    asked: u32,
    last: Option<Instant>,
}

/// Which groups to ask for an election of.
#[derive(Debug, Default)]
struct Asker {
    waiting: BTreeMap<String, Waiting>,
}

impl Asker {
    /// Those of `groups` that could elect a leader and have none, at this look and the one before: a group that is just about
    /// it has one at the next. Who was alone at the one before had none.
    fn due<'a>(
        &mut self,
        groups: &'a [RaftGroup],
        connected: &BTreeSet<String>,
        was_alone: bool,
        now: Instant,
    ) -> Vec<&'a RaftGroup> {
        let before = std::mem::take(&mut self.waiting);
        let mut due = Vec::new();
        for group in groups.iter().filter(|group| may_elect(group, connected)) {
            let mut waiting = Waiting::default();
            let known = was_alone.then(Waiting::default);
            if let Some(seen) = before.get(&group.name).copied().or(known) {
                waiting = seen;
                let rested = seen.last.is_none_or(|last| now.duration_since(last) >= ASK_AGAIN);
                if rested && seen.asked < MAX_ASKED {
                    waiting = Waiting { asked: seen.asked + 1, last: Some(now) };
                    due.push(group);
                }
            }
            self.waiting.insert(group.name.clone(), waiting);
        }
        due
    }
}

/// Whether it has no leader, though enough of its servers are connected. A server without a log could be made to vote for
/// nobody: it is left alone, and so is a group of one.
fn may_elect(group: &RaftGroup, connected: &BTreeSet<String>) -> bool {
    let there = 1 + group.peers.iter().filter(|id| connected.contains(*id)).count() as u64;
    !group.has_leader && group.last_index > 0 && !group.peers.is_empty() && there >= group.quorum
}

/// Until it is aborted.
pub(super) async fn watch(identity: Arc<Identity>) {
    let (mut asker, mut routes) = (Asker::default(), BTreeMap::new());
    let (mut attentive_until, mut led) = (Instant::now() + ATTENTIVE, 0);
    loop {
        let (was_alone, attentive) = (routes.is_empty(), Instant::now() < attentive_until);
        sleep(match (attentive, was_alone) {
            (true, _) => PERIOD_ATTENTIVE,
            (false, true) => PERIOD_ALONE,
            (false, false) => PERIOD,
        })
        .await;
        let Ok(now) = monitor::routes(identity.ports.monitor).await else { continue };
        if now != routes {
            routes = now;
            (attentive_until, led) = (Instant::now() + ATTENTIVE, 0);
        }
        if routes.is_empty() || Instant::now() >= attentive_until {
            asker = Asker::default();
            continue;
        }
        let connected: BTreeSet<String> = routes.values().map(|name| peer_id(name)).collect();
        let groups = raft_groups(&identity).await;
        led = if groups.iter().all(|group| group.has_leader) { led + 1 } else { 0 };
        if led >= LED_LOOKS {
            attentive_until = Instant::now();
        }
        let due = asker.due(&groups, &connected, was_alone, Instant::now());
        if !due.is_empty()
            && let Err(e) = ask(&identity, &due).await
        {
            debug!("no election was asked for: {e}");
        }
    }
}

async fn raft_groups(identity: &Identity) -> Vec<RaftGroup> {
    let mut groups = Vec::new();
    for account in ACCOUNTS {
        // None where the account has none.
        groups.extend(monitor::raft_groups(identity.ports.monitor, account).await.unwrap_or_default());
    }
    groups
}

async fn ask(identity: &Identity, groups: &[&RaftGroup]) -> Result<(), FabricError> {
    let failed = |reason: String| FabricError::Connect { reason };
    let options = identity.client_options(bootstrap::sys_options(&identity.accounts))?;
    let address = format!("nats://{}", identity.ports.client_address());
    let client = options.connect(address).await.map_err(|e| failed(e.to_string()))?;
    for group in groups {
        debug!(group = group.name, term = group.term, "an election is asked for");
        // The answer is of no interest.
        let reply = client.new_inbox();
        let sent = client.publish_with_reply(subject(group), reply, request(group).into()).await;
        sent.map_err(|e| failed(e.to_string()))?;
    }
    client.flush().await.map_err(|e| failed(e.to_string()))
}

fn subject(group: &RaftGroup) -> String {
    format!("$NRG.V.{}", group.name)
}

/// A request for votes, as servers send it: a term that is news to everybody, and the end of a log that everybody is beyond.
fn request(group: &RaftGroup) -> Vec<u8> {
    let (last_term, last_index) = (0u64, 0u64);
    let mut bytes = Vec::with_capacity(32);
    for number in [group.term + 1, last_term, last_index] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(NOBODY);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, peers: &[&str], quorum: u64) -> RaftGroup {
        let peers = peers.iter().map(|p| (*p).to_owned()).collect();
        RaftGroup { name: name.to_owned(), has_leader: false, term: 7, last_index: 9, quorum, peers }
    }

    fn there(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn it_is_asked_when_enough_are_there_and_not_too_often() {
        let (mut asker, start) = (Asker::default(), Instant::now());
        let groups = [
            group("two", &["B"], 2),
            group("three", &["B", "C"], 2),
            group("five", &["B", "C", "D", "E"], 3),
        ];
        let mut asked = |seconds: f64, ids: &[&str]| -> Vec<String> {
            let now = start + Duration::from_secs_f64(seconds);
            asker.due(&groups, &there(ids), false, now).iter().map(|g| g.name.clone()).collect()
        };
        assert!(asked(0.0, &[]).is_empty() && asked(0.2, &[]).is_empty(), "alone");
        assert!(asked(0.4, &["C"]).is_empty(), "it may just be about it");
        assert_eq!(asked(0.6, &["C"]), ["three"]);
        assert!(asked(0.8, &["C"]).is_empty(), "it was asked");
        assert!(asked(1.0, &["B", "C"]).is_empty());
        assert_eq!(asked(1.2, &["B", "C"]), ["two", "five"]);
        assert_eq!(asked(2.7, &["B", "C"]), ["three"]);
        let later = (3..100).flat_map(|n| asked(f64::from(n), &["B", "C"])).filter(|name| name == "two");
        assert_eq!(later.count(), 3, "four times at most");
        assert!(asked(101.0, &[]).is_empty() && asked(102.0, &["B"]).is_empty());
        assert_eq!(asked(103.0, &["B"]), ["two", "three"], "a new case");
    }

    #[test]
    fn who_was_alone_asks_at_once() {
        let (mut asker, groups) = (Asker::default(), [group("two", &["B"], 2)]);
        assert_eq!(asker.due(&groups, &there(&["B"]), true, Instant::now()).len(), 1);
        assert!(asker.due(&groups, &there(&["B"]), false, Instant::now()).is_empty(), "it was asked");
    }

    #[test]
    fn what_has_a_leader_no_log_or_no_peers_is_left_alone() {
        let mut groups = [group("a", &["B"], 2), group("b", &["B"], 2), group("c", &[], 1)];
        groups[0].has_leader = true;
        groups[1].last_index = 0;
        assert!(groups.iter().all(|group| !may_elect(group, &there(&["B"]))));
    }
}
