//! Rows on the wire: a frame is a table of versions and sections of rows, MessagePack, compressed when that pays.
//! Invariant: decoding bytes of a peer never panics and never allocates more than they justify.
//!
//! A frame is `flags u8` (1: zstd, else plain; 2: rows of the schema, which come before all others) and a MessagePack
//! array `[versions, section…]`. A section is `[table, [key column…], [column…], rows as bin]`, with `true` at the end
//! if the table keeps both rows of an id collision. A row is a byte of flags, the key's values, then as flagged the
//! birth, the death, the written columns and the births of the rows referred to (indexes into the frame's versions),
//! then, if it is alive, its values.

use std::collections::HashMap;
use std::io::Read;

use rmp::Marker;
use rmp::encode::{write_array_len, write_bin, write_f64, write_sint, write_str, write_uint};

use super::value::ValueRef;
use super::version::{Hlc, SiteId, Version};

/// Frames shorter than this stay as they are: compressing them costs more than it saves.
const COMPRESS_FROM_BYTES: usize = 512;
/// SQLite's own largest row, and room for what stands around it; a larger frame is refused.
const MAX_FRAME_BYTES: u64 = 1_100_000_000;
const ZSTD_LEVEL: i32 = 1;
/// What a compressed frame may unpack to, besides so many times its own size: bytes have to justify the memory that
/// they take. What shrinks by more is sent as it is.
const UNPACKED_BYTES: u64 = 16 * 1024 * 1024;
const UNPACKED_TIMES: u64 = 100;

const PACKED: u8 = 1;
const OF_SCHEMA: u8 = 2;

const DEAD: u8 = 1;
const BIRTH: u8 = 2;
const COLUMNS: u8 = 4;
const REFS: u8 = 8;
const FIXED: u8 = 16;

/// Why bytes from a peer are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end too early.
    #[error("the message is cut short")]
    Truncated,
    /// A newer litemesh wrote it.
    #[error("the message has format {0}, this litemesh reads up to {1}: upgrade this node")]
    Version(u8, u8),
    /// Not what the format says.
    #[error("the message is malformed: {0}")]
    Malformed(&'static str),
    /// Larger than any row can be.
    #[error("the message is larger than any can be, or than its bytes justify")]
    TooLarge,
}

/// One row's versions, as a writer gives them.
#[derive(Debug, Clone, Copy)]
pub struct RowVersions<'a> {
    /// The birth of this incarnation.
    pub birth: Version,
    /// Its death.
    pub dead: Option<Version>,
    /// (index of the column in its section, version).
    pub columns: &'a [(u32, Version)],
    /// (index of the column in its section, birth of the row it refers to); of a dead row its successor's birth.
    pub refs: &'a [(u32, Version)],
    /// Whether it never moves, though its table keeps both rows of an id collision: it was written before that.
    pub fixed: bool,
}

/// Builds one frame.
pub struct FrameWriter {
    versions: Vec<Version>,
    index: HashMap<Version, u64>,
    sections: Vec<u8>,
    section_count: u32,
    rows: Vec<u8>,
    head: Vec<u8>,
    flags: u8,
    keeps_both: bool,
}

impl FrameWriter {
    /// An empty frame; a row born at `default` does not spell its birth out.
    pub fn new(default: Version) -> Self {
        let index = HashMap::from([(default, 0)]);
        let (sections, rows, head) = (Vec::new(), Vec::new(), Vec::new());
        let (section_count, flags, keeps_both) = (0, 0, false);
        Self { versions: vec![default], index, sections, section_count, rows, head, flags, keeps_both }
    }

    /// Says that the frame's rows are the schema's.
    pub fn mark_schema(&mut self) {
        self.flags |= OF_SCHEMA;
    }

    /// Starts the rows of a table.
    pub fn begin_section(&mut self, table: &str, keys: &[&str], columns: &[&str], keeps_both: bool) {
        self.end_section();
        self.keeps_both = keeps_both;
        let head = &mut self.head;
        infallible(write_array_len(head, if keeps_both { 5 } else { 4 }));
        infallible(write_str(head, table));
        for names in [keys, columns] {
            infallible(write_array_len(head, names.len() as u32));
            for name in names {
                infallible(write_str(head, name));
            }
        }
    }

    /// Adds a row to the section. `values` are the section's columns, none if the row is dead.
    pub fn row<'v>(
        &mut self,
        key: impl Iterator<Item = ValueRef<'v>>,
        versions: RowVersions<'_>,
        values: impl Iterator<Item = ValueRef<'v>>,
    ) {
        let birth = self.version(versions.birth);
        let mut flags = 0;
        flags |= if versions.dead.is_some() { DEAD } else { 0 };
        flags |= if birth != 0 { BIRTH } else { 0 };
        flags |= if versions.columns.is_empty() { 0 } else { COLUMNS };
        flags |= if versions.refs.is_empty() { 0 } else { REFS };
        flags |= if versions.fixed { FIXED } else { 0 };
        self.rows.push(flags);
        key.for_each(|v| write_value(&mut self.rows, v));
        if birth != 0 {
            infallible(write_uint(&mut self.rows, birth));
        }
        if let Some(dead) = versions.dead {
            let dead = self.version(dead);
            infallible(write_uint(&mut self.rows, dead));
        }
        for list in [versions.columns, versions.refs].into_iter().filter(|l| !l.is_empty()) {
            infallible(write_uint(&mut self.rows, list.len() as u64));
            for (column, version) in list {
                let version = self.version(*version);
                infallible(write_uint(&mut self.rows, u64::from(*column)));
                infallible(write_uint(&mut self.rows, version));
            }
        }
        values.for_each(|v| write_value(&mut self.rows, v));
    }

    /// Bytes gathered so far, before compression.
    pub fn len(&self) -> usize {
        self.sections.len() + self.rows.len()
    }

    /// Whether no row was added.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The finished frame.
    pub fn finish(mut self) -> Vec<u8> {
        self.end_section();
        let mut plain = vec![self.flags];
        infallible(write_array_len(&mut plain, self.section_count + 1));
        infallible(write_array_len(&mut plain, self.versions.len() as u32 * 2));
        for version in &self.versions {
            infallible(write_uint(&mut plain, version.site.0));
            infallible(write_uint(&mut plain, version.hlc.0));
        }
        plain.extend_from_slice(&self.sections);
        if plain.len() >= COMPRESS_FROM_BYTES
            && let Ok(packed) = zstd::bulk::compress(&plain[1..], ZSTD_LEVEL)
            && packed.len() + 1 < plain.len()
            && plain.len() as u64 <= most_unpacked(packed.len())
        {
            let mut frame = vec![self.flags | PACKED];
            frame.extend_from_slice(&packed);
            return frame;
        }
        plain
    }

    fn end_section(&mut self) {
        if self.head.is_empty() {
            return;
        }
        if !self.rows.is_empty() {
            self.sections.extend_from_slice(&self.head);
            infallible(write_bin(&mut self.sections, &self.rows));
            if self.keeps_both {
                self.sections.push(Marker::True.to_u8());
            }
            self.section_count += 1;
        }
        self.head.clear();
        self.rows.clear();
    }

    fn version(&mut self, version: Version) -> u64 {
        let next = self.versions.len() as u64;
        let versions = &mut self.versions;
        *self.index.entry(version).or_insert_with(|| {
            versions.push(version);
            next
        })
    }
}

/// What so many compressed bytes may unpack to.
fn most_unpacked(packed: usize) -> u64 {
    (packed as u64).saturating_mul(UNPACKED_TIMES).clamp(UNPACKED_BYTES, MAX_FRAME_BYTES)
}

/// Writing into memory cannot fail.
fn infallible<T, E>(result: Result<T, E>) {
    debug_assert!(result.is_ok());
}

/// Appends one value as MessagePack: text as str (whatever its bytes), blobs as bin.
fn write_value(out: &mut Vec<u8>, value: ValueRef<'_>) {
    match value {
        ValueRef::Null => out.push(Marker::Null.to_u8()),
        ValueRef::Int(i) => infallible(write_sint(out, i)),
        ValueRef::Real(r) => infallible(write_f64(out, r)),
        ValueRef::Text(b) => {
            infallible(rmp::encode::write_str_len(out, b.len() as u32));
            out.extend_from_slice(b);
        }
        ValueRef::Blob(b) => infallible(write_bin(out, b)),
    }
}

/// A frame's plain bytes, ready to be read.
pub struct Frame(Vec<u8>);

impl Frame {
    /// Whether a frame as it came over the wire says that its rows are the schema's.
    pub fn is_of_schema(bytes: &[u8]) -> bool {
        bytes.first().is_some_and(|flags| flags & OF_SCHEMA != 0)
    }

    /// Unpacks a frame as it came over the wire.
    pub fn open(bytes: &[u8]) -> Result<Self, WireError> {
        match bytes.split_first() {
            None => Err(WireError::Truncated),
            Some((flags, _)) if flags & !(PACKED | OF_SCHEMA) != 0 => {
                Err(WireError::Malformed("an unknown packing"))
            }
            Some((flags, plain)) if flags & PACKED == 0 => Ok(Self(plain.to_vec())),
            Some((_, packed)) => {
                let malformed = |_| WireError::Malformed("the compressed part does not unpack");
                let reader = zstd::stream::read::Decoder::new(packed).map_err(malformed)?;
                let mut plain = Vec::new();
                let most = most_unpacked(packed.len());
                reader.take(most + 1).read_to_end(&mut plain).map_err(malformed)?;
                if plain.len() as u64 > most {
                    return Err(WireError::TooLarge);
                }
                Ok(Self(plain))
            }
        }
    }

    /// Reads the versions and the sections' heads.
    pub fn sections(&self) -> Result<Vec<Section<'_>>, WireError> {
        let mut input = Input(&self.0);
        let count = input.array()?;
        let numbers = input.array()?;
        if count == 0 || numbers == 0 || numbers % 2 != 0 {
            return Err(WireError::Malformed("no versions"));
        }
        let mut versions = Vec::new();
        for _ in 0..numbers / 2 {
            let site = SiteId(input.uint()?);
            versions.push(Version { site, hlc: Hlc(input.uint()?) });
        }
        let versions: std::rc::Rc<[Version]> = versions.into();
        let mut sections = Vec::new();
        for _ in 1..count {
            let parts = input.array()?;
            if parts != 4 && parts != 5 {
                return Err(WireError::Malformed("a section has four or five parts"));
            }
            let table = input.name()?;
            let keys = input.names()?;
            let columns = input.names()?;
            let rows = Input(input.bytes()?);
            let keeps_both = parts == 5;
            if keeps_both && input.marker()? != Marker::True {
                return Err(WireError::Malformed("a section's mark is true or not there"));
            }
            sections.push(Section { table, keys, columns, keeps_both, versions: versions.clone(), rows });
        }
        if !input.0.is_empty() {
            return Err(WireError::Malformed("bytes after the last section"));
        }
        Ok(sections)
    }
}

/// The rows of one table in a frame.
pub struct Section<'a> {
    /// The table's name.
    pub table: &'a str,
    /// Its key's columns.
    pub keys: Vec<&'a str>,
    /// The other columns that travel.
    pub columns: Vec<&'a str>,
    /// Whether the keys are those that the rows' writers gave them (`core::rekey`).
    pub keeps_both: bool,
    versions: std::rc::Rc<[Version]>,
    rows: Input<'a>,
}

/// One row of a section, into buffers that are used again.
#[derive(Default)]
pub struct RowBuffer<'a> {
    /// The key's values.
    pub key: Vec<ValueRef<'a>>,
    /// (index of the column in its section, version).
    pub columns: Vec<(u32, Version)>,
    /// (index of the column in its section, birth of the row it refers to); of a dead row its successor's birth.
    pub refs: Vec<(u32, Version)>,
    /// Whether it never moves; see [`RowVersions::fixed`].
    pub fixed: bool,
    /// The values of the section's columns; empty if the row is dead.
    pub values: Vec<ValueRef<'a>>,
}

impl<'a> Section<'a> {
    /// The next row's birth and death, its rest in `row`; `None` after the last.
    pub fn next_row(
        &mut self,
        row: &mut RowBuffer<'a>,
    ) -> Result<Option<(Version, Option<Version>)>, WireError> {
        let Some((&flags, rest)) = self.rows.0.split_first() else { return Ok(None) };
        self.rows.0 = rest;
        if flags & !(DEAD | BIRTH | COLUMNS | REFS | FIXED) != 0 {
            return Err(WireError::Malformed("unknown flags on a row"));
        }
        row.fixed = flags & FIXED != 0;
        row.key.clear();
        row.columns.clear();
        row.refs.clear();
        row.values.clear();
        for _ in 0..self.keys.len() {
            row.key.push(self.rows.value()?);
        }
        let birth = if flags & BIRTH != 0 { self.version()? } else { self.versions[0] };
        let dead = if flags & DEAD != 0 { Some(self.version()?) } else { None };
        if flags & COLUMNS != 0 {
            self.column_versions(&mut row.columns, self.columns.len())?;
        }
        if flags & REFS != 0 {
            self.column_versions(&mut row.refs, self.columns.len().max(1))?;
        }
        if dead.is_none() {
            for _ in 0..self.columns.len() {
                row.values.push(self.rows.value()?);
            }
        }
        Ok(Some((birth, dead)))
    }

    fn column_versions(&mut self, out: &mut Vec<(u32, Version)>, columns: usize) -> Result<(), WireError> {
        for _ in 0..self.rows.uint()? {
            let column = self.rows.uint()?;
            if column >= columns as u64 {
                return Err(WireError::Malformed("a column beyond the section's"));
            }
            let version = self.version()?;
            out.push((column as u32, version));
        }
        Ok(())
    }

    fn version(&mut self) -> Result<Version, WireError> {
        let index = self.rows.uint()?;
        let version = usize::try_from(index).ok().and_then(|i| self.versions.get(i));
        version.copied().ok_or(WireError::Malformed("a version beyond the frame's"))
    }
}

/// Bytes that are read from the front.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(WireError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        self.take(N)?.try_into().map_err(|_| WireError::Truncated)
    }

    fn marker(&mut self) -> Result<Marker, WireError> {
        Ok(Marker::from_u8(self.fixed::<1>()?[0]))
    }

    fn number(&mut self, marker: Marker) -> Result<Option<i128>, WireError> {
        Ok(Some(match marker {
            Marker::FixPos(n) => i128::from(n),
            Marker::FixNeg(n) => i128::from(n),
            Marker::U8 => i128::from(self.fixed::<1>()?[0]),
            Marker::U16 => i128::from(u16::from_be_bytes(self.fixed()?)),
            Marker::U32 => i128::from(u32::from_be_bytes(self.fixed()?)),
            Marker::U64 => i128::from(u64::from_be_bytes(self.fixed()?)),
            Marker::I8 => i128::from(i8::from_be_bytes(self.fixed()?)),
            Marker::I16 => i128::from(i16::from_be_bytes(self.fixed()?)),
            Marker::I32 => i128::from(i32::from_be_bytes(self.fixed()?)),
            Marker::I64 => i128::from(i64::from_be_bytes(self.fixed()?)),
            _ => return Ok(None),
        }))
    }

    fn uint(&mut self) -> Result<u64, WireError> {
        let marker = self.marker()?;
        let number = self.number(marker)?.and_then(|n| u64::try_from(n).ok());
        number.ok_or(WireError::Malformed("not an unsigned number"))
    }

    fn array(&mut self) -> Result<u32, WireError> {
        match self.marker()? {
            Marker::FixArray(n) => Ok(u32::from(n)),
            Marker::Array16 => Ok(u32::from(u16::from_be_bytes(self.fixed()?))),
            Marker::Array32 => Ok(u32::from_be_bytes(self.fixed()?)),
            _ => Err(WireError::Malformed("not an array")),
        }
    }

    fn length(&mut self, marker: Marker) -> Result<Option<usize>, WireError> {
        Ok(Some(match marker {
            Marker::FixStr(n) => usize::from(n),
            Marker::Str8 | Marker::Bin8 => usize::from(self.fixed::<1>()?[0]),
            Marker::Str16 | Marker::Bin16 => usize::from(u16::from_be_bytes(self.fixed()?)),
            Marker::Str32 | Marker::Bin32 => u32::from_be_bytes(self.fixed()?) as usize,
            _ => return Ok(None),
        }))
    }

    fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let marker = self.marker()?;
        let len = self.length(marker)?.ok_or(WireError::Malformed("not bytes"))?;
        self.take(len)
    }

    fn name(&mut self) -> Result<&'a str, WireError> {
        std::str::from_utf8(self.bytes()?).map_err(|_| WireError::Malformed("a name that is not UTF-8"))
    }

    fn names(&mut self) -> Result<Vec<&'a str>, WireError> {
        (0..self.array()?).map(|_| self.name()).collect()
    }

    fn value(&mut self) -> Result<ValueRef<'a>, WireError> {
        let marker = self.marker()?;
        if let Some(n) = self.number(marker)? {
            let n = i64::try_from(n).map_err(|_| WireError::Malformed("a number beyond 64 bits"))?;
            return Ok(ValueRef::Int(n));
        }
        match marker {
            Marker::Null => Ok(ValueRef::Null),
            Marker::F64 => Ok(ValueRef::Real(f64::from_be_bytes(self.fixed()?))),
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => {
                let len = self.length(marker)?.unwrap_or(0);
                Ok(ValueRef::Blob(self.take(len)?))
            }
            _ => {
                let len = self.length(marker)?.ok_or(WireError::Malformed("not a value"))?;
                Ok(ValueRef::Text(self.take(len)?))
            }
        }
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
