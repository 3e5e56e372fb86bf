//! The laws of merging over states that nodes really come to: generated histories of several sites that insert, update,
//! delete, replace and change keys, with clocks that stand, go back and are equal. Invariant: the histories follow
//! absorb's rules, so a state here is one that a file can hold.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::core::version::{Hlc, SiteId};

const SITES: usize = 3;
const KEYS: u8 = 3;

#[derive(Debug, Clone)]
enum Step {
    /// A row is inserted, or replaced by another under its key.
    Insert {
        site: usize,
        key: u8,
        a: i64,
        b: i64,
    },
    Update {
        site: usize,
        key: u8,
        column: ColumnId,
        value: i64,
    },
    Delete {
        site: usize,
        key: u8,
    },
    /// The row gets another key: deleted here, inserted there.
    Rename {
        site: usize,
        from: u8,
        to: u8,
    },
    /// A site's wall clock is set, back too.
    Clock {
        site: usize,
        ms: u64,
    },
    /// One site takes in all of another, or one row.
    Take {
        to: usize,
        from: usize,
        key: Option<u8>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let (site, key) = (0..SITES, 0..KEYS);
    prop_oneof![
        (site.clone(), key.clone(), 0i64..3, 0i64..3).prop_map(|(site, key, a, b)| Step::Insert {
            site,
            key,
            a,
            b
        }),
        (site.clone(), key.clone(), 0u32..2, 0i64..3).prop_map(|(site, key, column, value)| Step::Update {
            site,
            key,
            column,
            value
        }),
        (site.clone(), key.clone()).prop_map(|(site, key)| Step::Delete { site, key }),
        (site.clone(), key.clone(), key.clone()).prop_map(|(site, from, to)| Step::Rename { site, from, to }),
        (site.clone(), 0u64..4).prop_map(|(site, ms)| Step::Clock { site, ms }),
        (site.clone(), site, prop::option::of(key)).prop_map(|(to, from, key)| Step::Take { to, from, key }),
    ]
}

#[derive(Default, Clone)]
struct Site {
    rows: BTreeMap<u8, Row>,
    hlc: Hlc,
    wall_ms: u64,
}

impl Site {
    fn tick(&mut self, site: usize) -> Version {
        self.hlc = self.hlc.tick(self.wall_ms);
        Version { hlc: self.hlc, site: SiteId(site as u64 + 1) }
    }

    fn insert(&mut self, version: Version, key: u8, values: BTreeMap<ColumnId, Value>) {
        self.rows.insert(key, Row { state: RowState::born(version), values });
    }

    fn delete(&mut self, version: Version, key: u8) -> Option<Row> {
        let row = self.rows.get(&key).filter(|r| r.state.dead.is_none())?.clone();
        let state = RowState { dead: Some(version), ..RowState::born(row.state.birth) };
        self.rows.insert(key, Row { state, values: BTreeMap::new() });
        Some(row)
    }
}

/// Runs a history; with `whole`, an update writes all columns, as of a table whose rows are merged as a whole. Returns every state that a key was in anywhere.
fn run(steps: &[Step], whole: bool) -> (Vec<Site>, BTreeMap<u8, Vec<Row>>) {
    let mut sites = vec![Site::default(); SITES];
    let mut seen: BTreeMap<u8, Vec<Row>> = BTreeMap::new();
    for step in steps {
        match step.clone() {
            Step::Insert { site, key, a, b } => {
                let version = sites[site].tick(site);
                sites[site].insert(version, key, [(0, Value::Int(a)), (1, Value::Int(b))].into());
            }
            Step::Update { site, key, column, value } => {
                let version = sites[site].tick(site);
                let row = sites[site].rows.get_mut(&key).filter(|r| r.state.dead.is_none());
                if let Some(row) = row.filter(|r| r.values[&column] != Value::Int(value)) {
                    row.values.insert(column, Value::Int(value));
                    let written = [0, 1].into_iter().filter(|c| whole || *c == column);
                    row.state.columns.extend(written.map(|c| (c, version)));
                }
            }
            Step::Delete { site, key } => {
                let version = sites[site].tick(site);
                sites[site].delete(version, key);
            }
            Step::Rename { site, from, to } if from != to => {
                let version = sites[site].tick(site);
                if let Some(row) = sites[site].delete(version, from) {
                    sites[site].insert(version, to, row.values);
                }
            }
            Step::Rename { .. } => {}
            Step::Clock { site, ms } => sites[site].wall_ms = ms,
            Step::Take { to, from, key } => {
                let other = sites[from].clone();
                for (k, theirs) in other.rows.iter().filter(|(k, _)| key.is_none_or(|key| key == **k)) {
                    let merged =
                        sites[to].rows.get(k).map_or_else(|| theirs.clone(), |ours| merge(ours, theirs));
                    sites[to].rows.insert(*k, merged);
                }
                sites[to].hlc = sites[to].hlc.max(other.hlc);
            }
        }
        for site in &sites {
            for (key, row) in &site.rows {
                let all = seen.entry(*key).or_default();
                if !all.contains(row) {
                    all.push(row.clone());
                }
            }
        }
    }
    (sites, seen)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn the_laws_hold_over_generated_histories(steps in prop::collection::vec(step(), 1..40)) {
        for states in run(&steps, false).1.values() {
            for a in states {
                prop_assert_eq!(&merge(a, a), a);
                for b in states {
                    let ab = merge(a, b);
                    prop_assert_eq!(&ab, &merge(b, a));
                    prop_assert_eq!(&merge(&ab, b), &ab);
                    prop_assert!(ab.state.dead.is_none() || ab.values.is_empty());
                }
            }
            for (i, a) in states.iter().enumerate() {
                for b in states.iter().skip(i % 3).step_by(3) {
                    for c in states.iter().skip(i % 2).step_by(2) {
                        prop_assert_eq!(merge(&merge(a, b), c), merge(a, &merge(b, c)));
                    }
                }
            }
        }
    }

    #[test]
    fn sites_that_hear_of_all_agree_whatever_the_order(steps in prop::collection::vec(step(), 1..60)) {
        let (sites, _) = run(&steps, false);
        let all = |order: [usize; SITES]| {
            let mut rows: BTreeMap<u8, Row> = BTreeMap::new();
            for site in order {
                for (key, theirs) in &sites[site].rows {
                    let merged = rows.get(key).map_or_else(|| theirs.clone(), |ours| merge(ours, theirs));
                    rows.insert(*key, merged);
                }
            }
            rows
        };
        let first = all([0, 1, 2]);
        for order in [[2, 1, 0], [1, 0, 2], [1, 2, 0]] {
            prop_assert_eq!(&first, &all(order));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn rows_written_as_a_whole_are_never_mixed(steps in prop::collection::vec(step(), 1..60)) {
        let (_, seen) = run(&steps, true);
        for states in seen.values() {
            for (a, b) in states.iter().flat_map(|a| states.iter().map(move |b| (a, b))) {
                let row = merge(a, b);
                let state = &row.state;
                prop_assert_eq!(state.column(0), state.column(1));
                // All of it is what one of them says.
                prop_assert!(row.values == a.values || row.values == b.values, "{:?} of {:?} and {:?}", row, a, b);
            }
        }
    }
}

#[test]
fn histories_hold_what_they_are_to_test() {
    use Step::{Clock, Delete, Insert, Rename, Take};
    let (sites, seen) = run(
        &[
            Clock { site: 0, ms: 3 },
            Insert { site: 0, key: 0, a: 1, b: 1 },
            Clock { site: 0, ms: 0 },
            // The clock went back; the next write is later all the same.
            Delete { site: 0, key: 0 },
            Insert { site: 0, key: 0, a: 2, b: 2 },
            Clock { site: 1, ms: 3 },
            // The same key at the same hlc.
            Insert { site: 1, key: 0, a: 3, b: 3 },
            Rename { site: 1, from: 0, to: 1 },
            Take { to: 2, from: 1, key: None },
            Take { to: 2, from: 0, key: Some(0) },
        ],
        false,
    );
    let hlcs = |key: u8| seen[&key].iter().map(|r| r.state.birth.hlc).collect::<Vec<_>>();
    assert_eq!(hlcs(0).iter().filter(|h| **h == Hlc::from_ms(3)).count(), 4, "{:?}", seen[&0]);
    assert_eq!(sites[2].rows[&0].values[&0], Value::Int(2));
    assert_eq!(sites[2].rows[&1].values[&0], Value::Int(3));
}
