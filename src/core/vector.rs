//! What a file holds of every site's feed. Invariant: a vector only grows, site by site.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::version::{Hlc, SiteId, Version};

/// The head of one feed as one file knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// The number of the last commit that is applied, without holes before it.
    pub n: u64,
    /// That commit's clock: every earlier commit of the site has a smaller one.
    pub hlc: Hlc,
    /// That commit's random id: the same number with another id is a fork.
    pub id: u64,
}

/// Site -> head of its feed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Vector(pub BTreeMap<SiteId, Point>);

impl Vector {
    /// The number of the last commit of `site` that is held; 0 if none is.
    pub fn n(&self, site: SiteId) -> u64 {
        self.0.get(&site).map_or(0, |p| p.n)
    }

    /// Whether the commit that made `version` is held. [`Version::ZERO`] always is.
    pub fn covers(&self, version: Version) -> bool {
        version == Version::ZERO || self.0.get(&version.site).is_some_and(|p| version.hlc <= p.hlc)
    }

    /// Whether everything in `other` is held.
    pub fn includes(&self, other: &Vector) -> bool {
        other.0.iter().all(|(site, point)| self.n(*site) >= point.n)
    }

    /// The first site of whose feed `other` holds more than this vector, with the number held here.
    pub fn first_missing(&self, other: &Vector) -> Option<(SiteId, u64)> {
        other.0.iter().find(|(s, p)| self.n(**s) < p.n).map(|(s, _)| (*s, self.n(*s)))
    }

    /// Raises one site's head; a lower one changes nothing.
    pub fn raise(&mut self, site: SiteId, point: Point) {
        let held = self.0.entry(site).or_insert(point);
        if held.n < point.n {
            *held = point;
        }
    }

    /// Element-wise maximum.
    pub fn merge(&mut self, other: &Vector) {
        for (site, point) in &other.0 {
            self.raise(*site, *point);
        }
    }

    /// The latest clock in it.
    pub fn latest(&self) -> Hlc {
        self.0.values().map(|p| p.hlc).max().unwrap_or_default()
    }

    /// Element-wise minimum.
    pub fn limit(&mut self, other: &Vector) {
        self.0.retain(|site, point| match other.0.get(site) {
            Some(limit) => {
                if limit.n < point.n {
                    *point = *limit;
                }
                true
            }
            None => false,
        });
    }

    /// A site whose number is the same in both, with different commits: a file was copied or went back.
    pub fn fork_with(&self, other: &Vector) -> Option<SiteId> {
        other.0.iter().find_map(|(site, theirs)| {
            let ours = self.0.get(site)?;
            (ours.n == theirs.n && ours.id != theirs.id).then_some(*site)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(entries: &[(u64, u64)]) -> Vector {
        let point = |n| Point { n, hlc: Hlc(n * 10), id: n };
        Vector(entries.iter().map(|(s, n)| (SiteId(*s), point(*n))).collect())
    }

    #[test]
    fn merging_takes_the_maximum_of_each_site() {
        let mut a = vector(&[(1, 5), (2, 1)]);
        a.merge(&vector(&[(1, 3), (2, 4), (3, 1)]));
        assert_eq!(a, vector(&[(1, 5), (2, 4), (3, 1)]));
        assert!(a.includes(&vector(&[(1, 5)])));
        assert_eq!(a.first_missing(&vector(&[(1, 5), (3, 2)])), Some((SiteId(3), 1)));
    }

    #[test]
    fn limiting_takes_the_minimum_of_each_site() {
        let mut a = vector(&[(1, 5), (2, 1), (3, 4)]);
        a.limit(&vector(&[(1, 3), (2, 4), (4, 9)]));
        assert_eq!(a, vector(&[(1, 3), (2, 1)]));
    }

    #[test]
    fn a_version_is_covered_by_its_sites_clock() {
        let v = vector(&[(1, 5)]);
        assert!(v.covers(Version { hlc: Hlc(50), site: SiteId(1) }));
        assert!(!v.covers(Version { hlc: Hlc(51), site: SiteId(1) }));
        assert!(!v.covers(Version { hlc: Hlc(1), site: SiteId(2) }));
        assert!(v.covers(Version::ZERO));
    }

    #[test]
    fn one_number_with_two_ids_is_a_fork() {
        let mut other = vector(&[(1, 5)]);
        assert_eq!(vector(&[(1, 5)]).fork_with(&other), None);
        other.0.get_mut(&SiteId(1)).unwrap().id = 99;
        assert_eq!(vector(&[(1, 5)]).fork_with(&other), Some(SiteId(1)));
    }
}
