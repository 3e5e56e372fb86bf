//! Comparing a file's rows with a peer's: tables in ranges of keys, then the rows of ranges that differ, then single
//! rows until they settle. Invariant: what is found was seen twice, and each time no write under way could explain it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::ReplicaError;
use super::verify::{Owner, Reader};
use crate::core::digest::{Difference, Hash, Layout, Seen, Verdict, judge};
use crate::core::verify::{
    Held, Key, LOOKUP_BYTES, LOOKUP_KEYS, Lookup, Question, RANGE_ROWS, Range, Reply, key_size,
};

/// Rows that may differ are looked at when there are this many of them.
const CANDIDATES: usize = 4_000;
/// How long to wait before rows that have not settled are looked at again.
const SETTLE_PAUSE: Duration = Duration::from_millis(100);

/// Why two files could not be compared. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// This file could not be read.
    #[error(transparent)]
    Here(#[from] ReplicaError),
    /// The peer could not answer.
    #[error("{0}")]
    There(String),
    /// The peer has not answered in time.
    #[error("it does not answer")]
    Silent,
    /// What the peer answered is no answer to the question.
    #[error("its answer does not fit the question: is it another release?")]
    Nonsense,
    /// What is here and not there may have been deleted, and that is forgotten.
    #[error(
        "it was away while deletes were forgotten that it has never heard of: it is compared once it has taken in a copy of \
         a peer's file"
    )]
    AwayThere,
    /// The other way round.
    #[error(
        "it has forgotten deletes that this node, which was away, has never heard of: it is compared once this node has \
         taken in a copy of a peer's file"
    )]
    AwayHere,
    /// This node is ending.
    #[error("this node is ending")]
    Ending,
}

/// Result of comparing.
pub type Result<T, E = CompareError> = std::result::Result<T, E>;

/// The peer.
pub trait Peer {
    /// Asks it something, and waits for the answer.
    fn ask(&mut self, question: Question) -> Result<Reply>;
}

/// How fast, and until when.
pub trait Pace {
    /// Called after each piece of work with what it took: may wait. An error ends the comparison.
    fn worked(&mut self, took: Duration) -> Result<()>;
    /// Waits.
    fn pause(&mut self, time: Duration) -> Result<()>;
    /// How long rows may take to settle.
    fn patience(&self) -> Duration;
}

/// A row that differs.
#[derive(Debug, Clone)]
pub struct Finding {
    /// Its table.
    pub layout: Layout,
    /// Its key.
    pub key: Key,
    /// How it differs.
    pub difference: Difference,
    /// What is seen here.
    pub ours: Seen,
    /// What is seen there.
    pub theirs: Seen,
}

/// What a comparison came to, besides the findings.
#[derive(Debug, Clone, Default)]
pub struct Compared {
    /// Rows looked at here.
    pub rows: u64,
    /// Rows that did not settle.
    pub unsettled: u64,
    /// Tables that were left out, and why.
    pub left_out: Vec<String>,
}

/// Compares this file with a peer's.
pub struct Comparison<'a> {
    /// This file.
    pub owner: &'a dyn Owner,
    /// Reads it.
    pub reader: &'a mut Reader,
    /// The peer.
    pub peer: &'a mut dyn Peer,
    /// How fast.
    pub pace: &'a mut dyn Pace,
    /// What came of it so far.
    pub compared: Compared,
}

impl<'a> Comparison<'a> {
    /// A comparison that has not begun.
    pub fn new(
        owner: &'a dyn Owner,
        reader: &'a mut Reader,
        peer: &'a mut dyn Peer,
        pace: &'a mut dyn Pace,
    ) -> Self {
        Self { owner, reader, peer, pace, compared: Compared::default() }
    }

    /// Compares all tables, or one; hands over what is found table by table, or more often.
    pub fn run(
        &mut self,
        only: Option<&str>,
        found: &mut dyn FnMut(Vec<Finding>) -> Result<()>,
    ) -> Result<()> {
        let ours = self.reader.layouts(self.owner)?;
        let Reply::Layouts(theirs, held) = self.peer.ask(Question::Layouts)? else {
            return Err(CompareError::Nonsense);
        };
        comparable(&self.owner.held()?, &held)?;
        let wanted = |l: &&Layout| only.is_none_or(|t| l.table.eq_ignore_ascii_case(t));
        for layout in ours.iter().filter(wanted) {
            match theirs.iter().find(|l| l.table == layout.table) {
                Some(there) if there == layout => self.table(layout, found)?,
                Some(_) => self.leave_out(layout, "has other columns or another key there"),
                None => self.leave_out(layout, "is not replicated there"),
            }
        }
        for layout in theirs.iter().filter(wanted) {
            if !ours.iter().any(|l| l.table == layout.table) {
                self.leave_out(layout, "is not replicated here");
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, layout: &Layout, why: &str) {
        self.compared.left_out.push(format!("table {:?} {why}", layout.table));
    }

    fn table(&mut self, layout: &Layout, found: &mut dyn FnMut(Vec<Finding>) -> Result<()>) -> Result<()> {
        let mut candidates = Vec::new();
        let mut after = None;
        loop {
            let started = Instant::now();
            let next = self.range(layout, after.clone(), &mut candidates)?;
            self.pace.worked(started.elapsed())?;
            let done = next.is_none();
            if candidates.len() >= CANDIDATES || done {
                let findings = self.settle(layout, std::mem::take(&mut candidates))?;
                if !findings.is_empty() {
                    found(findings)?;
                }
            }
            if done {
                return Ok(());
            }
            if next == after {
                return Err(CompareError::Nonsense);
            }
            after = next;
        }
    }

    /// Compares one range; returns where the next one starts.
    fn range(
        &mut self,
        layout: &Layout,
        after: Option<Key>,
        candidates: &mut Vec<Key>,
    ) -> Result<Option<Key>> {
        let mut range = Range { layout: layout.clone(), after, upto: None };
        let part = self.reader.digest(self.owner, &range, RANGE_ROWS)?;
        range.upto = part.end;
        let (theirs, end) = match self.peer.ask(Question::Range(range.clone(), part.digest))? {
            Reply::Same => {
                self.compared.rows += part.digest.rows;
                return Ok(range.upto);
            }
            Reply::Rows(rows, end) => (rows, end),
            _ => return Err(CompareError::Nonsense),
        };
        if end.is_some() {
            range.upto = end;
        }
        let (ours, our_end) = self.reader.list(self.owner, &range, RANGE_ROWS * 4)?;
        self.compared.rows += ours.len() as u64;
        let mut left: HashMap<Key, Hash> = theirs.into_iter().collect();
        for (key, hash) in ours {
            if left.remove(&key) != Some(hash) {
                candidates.push(key);
            }
        }
        candidates.extend(left.into_keys());
        Ok(our_end.or(range.upto))
    }

    /// Looks at single rows until it is clear what each means, or patience ends.
    fn settle(&mut self, layout: &Layout, candidates: Vec<Key>) -> Result<Vec<Finding>> {
        let mut open: Vec<(Key, Option<Difference>)> = candidates.into_iter().map(|k| (k, None)).collect();
        let (mut findings, mut spellings) = (Vec::new(), HashSet::new());
        let started = Instant::now();
        let mut rounds = 0;
        while !open.is_empty() && (rounds < 3 || started.elapsed() < self.pace.patience()) {
            if rounds > 0 {
                self.pace.pause(SETTLE_PAUSE)?;
            }
            rounds += 1;
            let mut still = Vec::new();
            for batch in batches(open) {
                let keys = batch.iter().map(|(k, _)| k.clone()).collect();
                let worked = Instant::now();
                let seen = self.look(layout, keys)?;
                self.pace.worked(worked.elapsed())?;
                for ((key, before), (ours, theirs, verdict)) in batch.into_iter().zip(seen) {
                    match verdict {
                        Verdict::Equal => {}
                        Verdict::Unsettled => still.push((key, None)),
                        Verdict::Differs(difference) if before.as_ref() == Some(&difference) => {
                            // One row whose key is spelled in two ways was a candidate under both.
                            let spelled = ours.present && theirs.present && ours.key != theirs.key;
                            if spelled && !spellings.insert((ours.key, theirs.key)) {
                                continue;
                            }
                            findings.push(Finding { layout: layout.clone(), key, difference, ours, theirs });
                        }
                        Verdict::Differs(difference) => still.push((key, Some(difference))),
                    }
                }
            }
            open = still;
        }
        self.compared.unsettled += open.len() as u64;
        Ok(findings)
    }

    fn look(&mut self, layout: &Layout, keys: Vec<Key>) -> Result<Vec<(Seen, Seen, Verdict)>> {
        let count = keys.len();
        let lookup = Lookup { layout: layout.clone(), keys, later_than_ms: None };
        let (ours, our_held) = self.owner.look_up(&lookup)?;
        let (theirs, their_held) = look_there(self.peer, lookup)?;
        // More may have been forgotten since the comparison began.
        comparable(&our_held, &their_held)?;
        debug_assert_eq!(ours.len(), count);
        let pairs = ours.into_iter().zip(theirs);
        let judged = pairs.map(|(ours, theirs)| {
            let verdict = judge(&ours, &our_held.vector, &theirs, &their_held.vector);
            (ours, theirs, verdict)
        });
        Ok(judged.collect())
    }
}

/// Whether a row that only one of two nodes has tells anything.
fn comparable(ours: &Held, theirs: &Held) -> Result<()> {
    if theirs.misses_forgotten(ours) {
        return Err(CompareError::AwayThere);
    }
    if ours.misses_forgotten(theirs) { Err(CompareError::AwayHere) } else { Ok(()) }
}

/// Asks a peer what it sees of rows.
pub fn look_there(peer: &mut dyn Peer, lookup: Lookup) -> Result<(Vec<Seen>, Held)> {
    let count = lookup.keys.len();
    match peer.ask(Question::Lookup(lookup))? {
        Reply::Seen(seen, held) if seen.len() == count => Ok((seen, held)),
        _ => Err(CompareError::Nonsense),
    }
}

/// Keys, and what goes with each, in parts that may be looked up at once.
pub fn batches<T>(items: Vec<(Key, T)>) -> Vec<Vec<(Key, T)>> {
    let mut out: Vec<Vec<(Key, T)>> = Vec::new();
    let mut bytes = 0;
    for item in items {
        let size = key_size(&item.0);
        match out.last_mut() {
            Some(last) if last.len() < LOOKUP_KEYS && bytes + size <= LOOKUP_BYTES => last.push(item),
            _ => {
                out.push(vec![item]);
                bytes = 0;
            }
        }
        bytes += size;
    }
    out
}
