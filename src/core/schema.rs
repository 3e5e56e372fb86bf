//! What a file's tables are, as far as replication cares. Invariant: two schemas agree when columns, keys and
//! affinities do; the text of DDL is never compared.

use super::merge::ColumnId;

/// The name under which a table's rowid travels when there is no other key.
pub const ROWID_KEY: &str = "_rowid_";

/// SQLite's column affinities (<https://www.sqlite.org/datatype3.html>, 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affinity {
    /// INTEGER.
    Integer,
    /// TEXT.
    Text,
    /// BLOB, or none.
    Blob,
    /// REAL.
    Real,
    /// NUMERIC.
    Numeric,
}

impl Affinity {
    /// The affinity of a declared type; `ANY` in a STRICT table has none.
    pub fn of(declared: &str, strict: bool) -> Self {
        let upper = declared.to_ascii_uppercase();
        let has = |part: &str| upper.contains(part);
        match () {
            () if strict && upper == "ANY" => Self::Blob,
            () if has("INT") => Self::Integer,
            () if has("CHAR") || has("CLOB") || has("TEXT") => Self::Text,
            () if has("BLOB") || upper.is_empty() => Self::Blob,
            () if has("REAL") || has("FLOA") || has("DOUB") => Self::Real,
            () => Self::Numeric,
        }
    }

    /// A declared type that has this affinity.
    pub fn sql(self) -> &'static str {
        match self {
            Self::Integer => "INTEGER",
            Self::Text => "TEXT",
            Self::Blob => "BLOB",
            Self::Real => "REAL",
            Self::Numeric => "NUMERIC",
        }
    }
}

/// A column of the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyColumn {
    /// Its name; [`ROWID_KEY`] for a table that is replicated by rowid.
    pub name: String,
    /// How it is written in SQL: the quoted name, or a name of the rowid that no column shadows.
    pub sql: String,
    /// Its affinity.
    pub affinity: Affinity,
    /// Its collating sequence.
    pub collation: String,
    /// Whether it may hold NULL.
    pub nullable: bool,
}

/// A column that is no part of the key and no generated one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its number in this file; also its bit in the log's masks.
    pub id: ColumnId,
    /// Its name.
    pub name: String,
    /// Its affinity.
    pub affinity: Affinity,
    /// Whether it must not be NULL.
    pub not_null: bool,
    /// Whether it has a default.
    pub has_default: bool,
}

impl Column {
    /// What stands in for a value that nobody gave, where neither NULL nor a default can: SQL.
    pub fn blank(&self) -> Option<&'static str> {
        match self.affinity {
            _ if !self.not_null || self.has_default => None,
            Affinity::Text | Affinity::Blob => Some("''"),
            _ => Some("0"),
        }
    }
}

/// A UNIQUE constraint or index besides the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UniqueIndex {
    /// The index's name.
    pub name: String,
    /// Its terms as SQL: quoted columns or expressions.
    pub terms: Vec<String>,
    /// The condition of a partial index.
    pub condition: Option<String>,
    /// Its columns, unless a term is an expression.
    pub columns: Option<Vec<String>>,
}

/// A FOREIGN KEY of one column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The column that refers.
    pub column: String,
    /// The table referred to.
    pub parent: String,
    /// Its column, unless it is the key.
    pub to: Option<String>,
}

/// How rows of a table are identified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// An `INTEGER PRIMARY KEY`: the rowid under a name.
    Integer,
    /// Any other primary key.
    Declared,
    /// No usable primary key: the rowid itself.
    Rowid,
}

/// A replicated table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its number in this file.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// How rows are identified.
    pub key_kind: KeyKind,
    /// Whether ids are handed out by AUTOINCREMENT.
    pub autoincrement: bool,
    /// Whether it is a WITHOUT ROWID table.
    pub without_rowid: bool,
    /// The key.
    pub key: Vec<KeyColumn>,
    /// The other columns.
    pub columns: Vec<Column>,
    /// Generated columns, which do not travel.
    pub generated: Vec<String>,
    /// Other UNIQUE constraints.
    pub uniques: Vec<UniqueIndex>,
    /// FOREIGN KEYs of one column.
    pub references: Vec<Reference>,
}

impl Table {
    /// Whether it is a table of ours.
    pub fn is_ours(&self) -> bool {
        self.name.starts_with(super::capture::PREFIX)
    }

    /// The columns by which its rows refer to the integer that is the key of `parent`.
    pub fn references_to<'t>(&'t self, parent: &'t Table) -> impl Iterator<Item = &'t Reference> {
        let by_key =
            |to: &Option<String>| to.as_ref().is_none_or(|t| t.eq_ignore_ascii_case(&parent.key[0].name));
        let refers = move |r: &&Reference| r.parent.eq_ignore_ascii_case(&parent.name) && by_key(&r.to);
        self.references.iter().filter(move |r| parent.key_kind == KeyKind::Integer && refers(r))
    }

    /// The column of this name, whatever its case.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|c| c.name.eq_ignore_ascii_case(name))
    }

    /// How many 62-bit masks its log rows need: the largest column number decides.
    pub fn mask_count(&self) -> usize {
        self.columns.iter().map(|c| c.id as usize / MASK_BITS + 1).max().unwrap_or(1)
    }
}

/// What happens to changes of the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SchemaMode {
    /// They replicate.
    #[default]
    Replicate,
    /// The operator runs the same migration on every node; rows wait for it.
    Manual,
}

/// How many columns one mask of the log holds: SQLite's integers have 63 bits without the sign.
pub const MASK_BITS: usize = 62;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinities_follow_sqlites_rules() {
        for (declared, expected) in [
            ("VARCHAR(36)", Affinity::Text),
            ("bigint", Affinity::Integer),
            ("", Affinity::Blob),
            ("DOUBLE PRECISION", Affinity::Real),
            ("DATETIME", Affinity::Numeric),
            ("FLOATING POINT", Affinity::Integer),
        ] {
            assert_eq!(Affinity::of(declared, false), expected, "{declared}");
        }
    }
}
