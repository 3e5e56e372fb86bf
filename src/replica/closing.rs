//! Ending a database's part in the mesh while programs go on writing to its file. Invariant: there is one moment up to
//! which all writes are the mesh's, and from which on they are this file's alone: nothing falls in between.

use super::Result;
use super::absorb::OwnCommit;
use super::engine::Engine;
use super::store::Store;
use crate::core::capture::PREFIX;
use crate::core::sqltext::ident;

impl Engine {
    /// Absorbs, and captures nothing any more: in one transaction. What was written until now is still told, and peers are
    /// still answered; nothing more is taken in.
    pub fn close(&mut self) -> Result<()> {
        self.sync = None;
        let own = self.store_mut().close()?;
        self.publish(own);
        Ok(())
    }

    /// Goes on as before [`Engine::close`]. What was written meanwhile is found by comparing the tables with a peer.
    pub fn reopen(&mut self) {
        self.store_mut().closed = false;
        // The schema is read again, and the triggers are put back.
        self.store_mut().schema_version = -1;
    }
}

impl Store {
    fn close(&mut self) -> Result<Option<OwnCommit>> {
        let own = self.write(|store| {
            let own = store.absorb_pending()?;
            let sql = "SELECT name FROM sqlite_schema WHERE type = 'trigger' AND substr(name, 1, ?2) = ?1";
            let mut statement = store.conn.prepare(sql)?;
            let names = statement.query_map((PREFIX, PREFIX.len() as i64), |r| r.get::<_, String>(0))?;
            for name in names.collect::<rusqlite::Result<Vec<_>>>()? {
                store.conn.execute_batch(&format!("DROP TRIGGER {}", ident(&name)))?;
            }
            Ok(own)
        })?;
        self.closed = true;
        Ok(own)
    }
}
