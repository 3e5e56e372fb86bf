//! Noticing that a file was replaced, or went back, while it is used. Invariant: once that is known, nothing is written
//! into the file any more under the site that it had: what litemesh has told of that is not what the file says.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rusqlite::OptionalExtension;

use super::store::Store;
use super::{ReplicaError, Result};

/// What tells a file from another of the same name; `None` for a database in memory.
pub(super) fn identity(path: &str) -> Option<(u64, u64)> {
    let found = std::fs::metadata(Path::new(path)).ok().filter(|_| !path.is_empty())?;
    Some((found.dev(), found.ino()))
}

impl Store {
    /// Looks whether the file is the one that was opened, as it was left.
    pub fn look_at_file(&mut self) -> Result<()> {
        if self.replaced.is_none() {
            self.replaced = self.what_happened()?;
        }
        match &self.replaced {
            Some(what) => Err(ReplicaError::Replaced(what.clone())),
            None => Ok(()),
        }
    }

    fn what_happened(&self) -> Result<Option<String>> {
        if self.identity.is_some() {
            match identity(self.path()) {
                None => {
                    let why = "the file is gone: put it back, or stop this node and let it fetch a copy";
                    return Err(ReplicaError::Unfit(why.to_owned()));
                }
                now if now != self.identity => {
                    return Ok(Some("another file was put in its place".to_owned()));
                }
                _ => {}
            }
        }
        let sql = "SELECT c.lsn, m.value, s.n, s.id FROM __litemesh_clock AS c, __litemesh_meta AS m,
                   __litemesh_site AS s WHERE c.id = 1 AND m.key = 'site' AND s.site = m.value";
        let read = self.conn.prepare_cached(sql).and_then(|mut statement| {
            let row = |r: &rusqlite::Row<'_>| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?));
            statement.query_row([], row).optional()
        });
        let found: Option<(i64, i64, i64, i64)> = match read {
            Ok(found) => found,
            Err(rusqlite::Error::SqliteFailure(e, Some(text)))
                if e.code == rusqlite::ErrorCode::Unknown && text.starts_with("no such table") =>
            {
                None
            }
            Err(e) => return Err(e.into()),
        };
        let Some((lsn, site, n, id)) = found else {
            return Ok(Some(
                "its content was replaced by that of a file without litemesh's tables".to_owned(),
            ));
        };
        let own = self.head.vector.0.get(&self.head.site);
        let (our_n, our_id) = own.map_or((0, 0), |p| (p.n as i64, p.id as i64));
        let same = site as u64 == self.head.site.0 && n >= our_n && (n > our_n || id == our_id);
        Ok((!same || lsn < self.head.lsn).then(|| "its content went back to what it was earlier".to_owned()))
    }
}
