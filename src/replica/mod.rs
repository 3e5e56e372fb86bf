//! One replicated file: capture, absorb, publish, apply, catch-up. Invariant: SQLite is the only truth; everything
//! here can be killed between any two steps and goes on from what the file says.

pub mod absorb;
pub mod adopt;
pub mod apply;
pub mod aside;
pub mod assemble;
pub mod body;
pub mod changes;
pub mod children;
pub mod clock;
pub mod closing;
pub mod compare;
pub mod conflict;
pub mod copy;
mod courtesy;
pub mod dates;
pub mod engine;
pub mod entry;
pub mod events;
pub mod forget;
pub mod fork;
pub mod held;
pub mod identity;
pub mod joined;
pub mod log_reading;
pub mod mark;
pub mod materialize;
pub mod merging;
pub mod page;
pub mod parts;
pub mod plan;
pub mod progress;
pub mod recall;
pub mod registry;
pub mod rekey;
pub mod repair;
pub mod restamp;
pub mod restore;
pub mod review;
pub mod rows;
pub mod same_file;
pub mod schema;
pub mod send;
pub mod shadow;
pub mod store;
pub mod turns;
pub mod unique;
pub mod unite;
pub mod verify;
pub mod watch;
pub mod worker;

use crate::core::frame::WireError;
use crate::sqlite::OpenError;

/// Why something could not be done with a file. The transaction was rolled back: the file is as before.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// SQLite refused.
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The file could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A temporary file could not be written or read.
    #[error("a temporary file in the state directory: {0}")]
    Spool(#[from] std::io::Error),
    /// A peer sent what cannot be read.
    #[error("from a peer: {0}")]
    Wire(#[from] WireError),
    /// Rows came for a table that is not here.
    #[error(
        "table {0:?} does not exist in this file yet: run the same migration here; its rows wait until then"
    )]
    NoTable(String),
    /// Rows came for a column that is not here.
    #[error(
        "table {table:?} has no column {column:?} in this file yet: run the same migration here; rows wait"
    )]
    NoColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// The table's key is another one at the sender.
    #[error("table {table:?} has the key ({here}) here and ({there}) at the peer: make them the same")]
    OtherKey {
        /// The table.
        table: String,
        /// The key here.
        here: String,
        /// The key there.
        there: String,
    },
    /// Two nodes changed one schema object at once, to different things.
    #[error(
        "{object} was changed on two nodes at once, and differently: here it is {here:?}, at the peer {there:?}; make \
         them the same on one of the two (ALTER TABLE, or drop it there), and all goes on by itself"
    )]
    Contradiction {
        /// The object.
        object: String,
        /// Its definition here.
        here: String,
        /// Its definition at the peer.
        there: String,
    },
    /// What a peer did to its schema cannot be done here.
    #[error("the schema cannot be brought to what a peer has: {what}: {source}")]
    Ddl {
        /// The statement, or what it was for.
        what: String,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// A table to be compared has other columns or another key here.
    #[error("table {0:?} has other columns or another key here: run the same migration on both nodes")]
    OtherLayout(String),
    /// The schema changes so often that no table can be read with the one it has.
    #[error("the file's schema is being changed all the time: try again later")]
    Restless,
    /// A peer asked for more at once than is answered.
    #[error("more was asked at once than is answered")]
    TooMuch,
    /// A peer wants the clock raised further than is sound.
    #[error("the asker's clock is too far ahead of this node's: set the clocks right")]
    ClockAhead,
    /// The database's thread has ended.
    #[error("the database is being stopped or detached")]
    Ended,
    /// A file's clock went on while rows were to be written again with an earlier one.
    #[error("the file's clock has passed the time that was set for the repair: run it again")]
    ClockPassed,
    /// The sender keeps both rows of an id collision in this table, which cannot do so here.
    #[error(
        "table {0:?} keeps both rows of an id collision at the peer, and here it has no INTEGER PRIMARY KEY: make the \
         table alike on all nodes; its rows wait until then"
    )]
    OtherRekey(String),
    /// The file is not the one that was opened, or not as litemesh left it.
    #[error("{0}")]
    Replaced(String),
    /// The file belongs to something else.
    #[error("{0}")]
    Unfit(String),
}

impl ReplicaError {
    /// Whether the schema here or there is what stands in the way: a peer's later state may fit where its commit does
    /// not.
    pub fn is_of_schema(&self) -> bool {
        matches!(
            self,
            Self::NoTable(_)
                | Self::NoColumn { .. }
                | Self::OtherKey { .. }
                | Self::Contradiction { .. }
                | Self::Ddl { .. }
        )
    }

    /// Whether trying again later, with nothing changed in the file's schema, may succeed.
    pub fn is_passing(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull, SystemIoFailure};
        match self {
            Self::Sqlite(e) => matches!(
                e.sqlite_error_code(),
                Some(DatabaseBusy | DatabaseLocked | DiskFull | SystemIoFailure)
            ),
            Self::Spool(_) => true,
            _ => false,
        }
    }
}

/// Result of work on a file.
pub type Result<T, E = ReplicaError> = std::result::Result<T, E>;
