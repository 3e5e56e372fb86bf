//! Values between SQLite and the wire. Invariant: text goes through as bytes, whatever they are.

use rusqlite::ToSql;
use rusqlite::types::{ToSqlOutput, ValueRef as SqlRef};

use crate::core::value::{Value, ValueRef};

impl<'a> From<SqlRef<'a>> for ValueRef<'a> {
    fn from(value: SqlRef<'a>) -> Self {
        match value {
            SqlRef::Null => Self::Null,
            SqlRef::Integer(i) => Self::Int(i),
            SqlRef::Real(r) => Self::Real(r),
            SqlRef::Text(b) => Self::Text(b),
            SqlRef::Blob(b) => Self::Blob(b),
        }
    }
}

impl ToSql for ValueRef<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match *self {
            ValueRef::Null => SqlRef::Null,
            ValueRef::Int(i) => SqlRef::Integer(i),
            ValueRef::Real(r) => SqlRef::Real(r),
            ValueRef::Text(b) => SqlRef::Text(b),
            ValueRef::Blob(b) => SqlRef::Blob(b),
        }))
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Value::Null => SqlRef::Null,
            Value::Int(i) => SqlRef::Integer(*i),
            Value::Real(r) => SqlRef::Real(*r),
            Value::Text(b) => SqlRef::Text(b),
            Value::Blob(b) => SqlRef::Blob(b),
        }))
    }
}

/// A column of a result row as a value of ours.
pub fn get<'r>(row: &'r rusqlite::Row<'_>, index: usize) -> rusqlite::Result<ValueRef<'r>> {
    row.get_ref(index).map(ValueRef::from)
}
