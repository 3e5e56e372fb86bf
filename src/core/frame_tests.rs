//! Tests of the frames: what goes in comes out, and hostile bytes are refused.

use proptest::prelude::*;

use super::*;
use crate::core::value::Value;

#[derive(Debug, Clone, PartialEq)]
struct Flat {
    key: Vec<Value>,
    birth: Version,
    dead: Option<Version>,
    columns: Vec<(u32, Version)>,
    refs: Vec<(u32, Version)>,
    fixed: bool,
    values: Vec<Value>,
}

fn at(h: u64, s: u64) -> Version {
    Version { hlc: Hlc(h), site: SiteId(s) }
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::Int),
        any::<f64>().prop_filter("NaN is NULL in SQLite", |r| !r.is_nan()).prop_map(Value::Real),
        Just(Value::Real(f64::NEG_INFINITY)),
        Just(Value::Real(-0.0)),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Value::Text),
        prop::collection::vec(any::<u8>(), 0..70_000).prop_map(Value::Blob),
    ]
}

fn flat() -> impl Strategy<Value = Flat> {
    let version = || (0u64..5, 1u64..4).prop_map(|(h, s)| at(h, s));
    let columns = || prop::collection::vec((0u32..3, version()), 0..3);
    let values = prop::collection::vec(value(), 3);
    let key = prop::collection::vec(value(), 2);
    (key, version(), prop::option::of(version()), columns(), columns(), any::<bool>(), values).prop_map(
        |(key, birth, dead, columns, refs, fixed, values)| {
            let values = if dead.is_some() { vec![] } else { values };
            Flat { key, birth, dead, columns, refs, fixed, values }
        },
    )
}

fn encode(rows: &[Flat]) -> Vec<u8> {
    let mut writer = FrameWriter::new(at(1, 1));
    writer.begin_section("empty", &["k"], &[], false);
    writer.begin_section("tä \"b\"", &["k1", "k2"], &["a", "b", "c"], rows.len() % 2 == 1);
    for r in rows {
        let versions =
            RowVersions { birth: r.birth, dead: r.dead, columns: &r.columns, refs: &r.refs, fixed: r.fixed };
        writer.row(r.key.iter().map(Value::as_ref), versions, r.values.iter().map(Value::as_ref));
    }
    writer.finish()
}

fn decode(bytes: &[u8]) -> Result<Vec<Flat>, WireError> {
    let frame = Frame::open(bytes)?;
    let mut out = Vec::new();
    for mut section in frame.sections()? {
        let mut row = RowBuffer::default();
        while let Some((birth, dead)) = section.next_row(&mut row)? {
            let own = |v: &[ValueRef<'_>]| v.iter().map(|v| v.to_value()).collect();
            let (key, values) = (own(&row.key), own(&row.values));
            out.push(Flat {
                key,
                birth,
                dead,
                columns: row.columns.clone(),
                refs: row.refs.clone(),
                fixed: row.fixed,
                values,
            });
        }
    }
    Ok(out)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_goes_in_comes_out(rows in prop::collection::vec(flat(), 0..12)) {
        prop_assert_eq!(decode(&encode(&rows)).unwrap(), rows);
    }

    #[test]
    fn damaged_bytes_never_panic(rows in prop::collection::vec(flat(), 1..4), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut bytes = encode(&rows);
        let i = at.index(bytes.len());
        bytes[i] = byte;
        let _ = decode(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        let _ = decode(&bytes);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
    }
}

#[test]
fn an_array_that_promises_more_than_it_holds_is_refused() {
    // versions: an array of 2^32-1 numbers, and nothing behind it
    assert_eq!(decode(&[0, 0x91, 0xdd, 0xff, 0xff, 0xff, 0xfe]), Err(WireError::Truncated));
    assert_eq!(decode(&[]), Err(WireError::Truncated));
    assert_eq!(decode(&[7]), Err(WireError::Malformed("an unknown packing")));
}

#[test]
fn an_empty_version_table_is_refused() {
    let no_versions = [0, 0x92, 0x90, 0x94, 0xa1, b't', 0x90, 0x90, 0xc4, 1, 0];
    assert!(decode(&no_versions).is_err());
}

#[test]
fn what_unpacks_to_far_more_than_it_is_is_refused() {
    let zeros = vec![0; 64 << 20];
    let mut bomb = vec![PACKED];
    bomb.extend(zstd::bulk::compress(&zeros, ZSTD_LEVEL).unwrap());
    assert!(bomb.len() < 64 * 1024, "{}", bomb.len());
    assert_eq!(Frame::open(&bomb).err(), Some(WireError::TooLarge));
}

#[test]
fn a_row_that_shrinks_by_more_than_that_comes_back() {
    for len in [1 << 20, 20 << 20] {
        let (birth, value) = (Version { hlc: Hlc(1), site: SiteId(1) }, vec![0; len]);
        let mut writer = FrameWriter::new(birth);
        writer.begin_section("t", &["k"], &["v"], false);
        let versions = RowVersions { birth, dead: None, columns: &[], refs: &[], fixed: false };
        writer.row([ValueRef::Int(1)].into_iter(), versions, [ValueRef::Blob(&value)].into_iter());
        let frame = writer.finish();
        assert_eq!(frame.len() < len, len < 16 << 20, "only what is large goes as it is");
        let frame = Frame::open(&frame).unwrap();
        let mut section = frame.sections().unwrap().remove(0);
        let mut row = RowBuffer::default();
        section.next_row(&mut row).unwrap().unwrap();
        assert!(matches!(row.values[..], [ValueRef::Blob(found)] if found == value));
    }
}
