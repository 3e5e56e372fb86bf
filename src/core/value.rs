//! SQLite's values, exactly. Invariant: a value read from one file and written to another is the same bytes of the
//! same storage class.

use std::cmp::Ordering;

/// One value of one of SQLite's five storage classes.
#[derive(Debug, Clone)]
pub enum Value {
    /// NULL.
    Null,
    /// A 64-bit integer.
    Int(i64),
    /// A double; never NaN (SQLite stores NULL for it).
    Real(f64),
    /// Text as stored, which need not be UTF-8.
    Text(Vec<u8>),
    /// Bytes.
    Blob(Vec<u8>),
}

impl Value {
    /// The value, borrowed.
    pub fn as_ref(&self) -> ValueRef<'_> {
        match self {
            Value::Null => ValueRef::Null,
            Value::Int(i) => ValueRef::Int(*i),
            Value::Real(r) => ValueRef::Real(*r),
            Value::Text(b) => ValueRef::Text(b),
            Value::Blob(b) => ValueRef::Blob(b),
        }
    }

    fn class(&self) -> u8 {
        match self {
            Value::Null => 0,
            Value::Int(_) => 1,
            Value::Real(_) => 2,
            Value::Text(_) => 3,
            Value::Blob(_) => 4,
        }
    }

    /// About how many bytes the value takes, for bounding pages.
    pub fn size(&self) -> usize {
        match self {
            Value::Text(b) | Value::Blob(b) => b.len() + 5,
            _ => 9,
        }
    }
}

/// A value that is borrowed from a statement or from a message.
#[derive(Debug, Clone, Copy)]
pub enum ValueRef<'a> {
    /// NULL.
    Null,
    /// A 64-bit integer.
    Int(i64),
    /// A double.
    Real(f64),
    /// Text as stored.
    Text(&'a [u8]),
    /// Bytes.
    Blob(&'a [u8]),
}

impl ValueRef<'_> {
    /// A copy that borrows nothing.
    pub fn to_value(self) -> Value {
        match self {
            ValueRef::Null => Value::Null,
            ValueRef::Int(i) => Value::Int(i),
            ValueRef::Real(r) => Value::Real(r),
            ValueRef::Text(b) => Value::Text(b.to_vec()),
            ValueRef::Blob(b) => Value::Blob(b.to_vec()),
        }
    }
}

/// A fixed total order, the same on every node: by storage class, then by content. Unlike SQLite's own it tells
/// 1 from 1.0 and 0.0 from -0.0, so that values that compare equal are the same.
impl Ord for Value {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Value::Int(a), Value::Int(b)) => a.cmp(b),
            (Value::Real(a), Value::Real(b)) => a.total_cmp(b),
            (Value::Text(a), Value::Text(b)) | (Value::Blob(a), Value::Blob(b)) => a.cmp(b),
            _ => self.class().cmp(&other.class()),
        }
    }
}

impl PartialOrd for Value {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Value {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_sqlite_calls_equal_are_told_apart() {
        assert_ne!(Value::Int(1), Value::Real(1.0));
        assert_ne!(Value::Real(0.0), Value::Real(-0.0));
        assert_ne!(Value::Text(b"a".to_vec()), Value::Blob(b"a".to_vec()));
        assert!(Value::Null < Value::Int(i64::MIN));
    }
}
